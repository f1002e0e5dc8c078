"""Answers to prompts: greedy and batched, by any of several adapters or by none."""
