"""C++ for a CPU: attention, products with 4-bit weights and thin adapters, loops in place of many passes of torch."""
