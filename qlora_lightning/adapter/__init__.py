"""An adapter folder as files: where it lies, and what it says it belongs to.

Importing this imports neither torch nor transformers, so that a misspelt folder is told at once.
"""
