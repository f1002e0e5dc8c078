"""``qlora-lightning evaluate``."""
