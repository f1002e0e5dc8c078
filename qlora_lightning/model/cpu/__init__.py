"""Attention and SwiGLU in C++ for a CPU."""
