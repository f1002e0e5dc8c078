"""LoRA on a base: the modules that carry it, its options, and the adapter folder that stores it."""
