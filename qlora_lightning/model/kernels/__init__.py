"""Loops in C++ for a CPU, each in place of many passes of torch over the same numbers."""
