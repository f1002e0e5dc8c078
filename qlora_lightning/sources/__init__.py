"""What is trained from: a base and an adapter by name, a GGUF to unpack, the cache; neither torch nor transformers."""
