"""``qlora-lightning inspect``."""
