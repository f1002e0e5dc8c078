"""``qlora-lightning chat``."""
