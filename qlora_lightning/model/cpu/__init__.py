"""Attention in C++ for a CPU."""
