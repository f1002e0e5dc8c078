"""``qlora-lightning plan``."""
