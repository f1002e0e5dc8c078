"""Rows: where they come from, and the conversation, text or tokens that each becomes."""
