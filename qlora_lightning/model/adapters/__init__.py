"""LoRA on a base: which modules carry it, with which options, and the folder that it is written to and read from."""
