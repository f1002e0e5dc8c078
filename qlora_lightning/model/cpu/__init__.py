"""C++ for a CPU: attention, and loops in place of many passes of torch."""
