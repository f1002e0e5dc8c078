"""Quality of a model on held-out rows: answers, scores, and base against adapter with intervals."""

BASE = "base"
"""Name of the side without an adapter, in tables and files."""

SERVED = "served"
"""Name of an inference server's side."""
