"""C++ for a CPU: attention, products with 4-bit weights, loops in place of many passes of torch."""
