"""A base of which each process holds a shard."""
