"""``qlora-lightning sweep-rank``."""
