"""Checkpoints: what they store besides tensors, and how a run resumes exactly where it stopped."""
