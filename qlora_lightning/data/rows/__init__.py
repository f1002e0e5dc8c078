"""Rows of data files and data sets, and their conversion to a conversation, text or tokens."""
