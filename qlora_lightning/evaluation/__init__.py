"""What a model is worth on rows it has not seen: answers, scores, and base beside adapter with intervals."""

BASE = "base"
"""Name of the side without an adapter, in tables and files."""
