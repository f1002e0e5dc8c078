"""What the machine is and has: devices, dtypes, memory in use, allocator and garbage collector."""
