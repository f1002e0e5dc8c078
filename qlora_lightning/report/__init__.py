"""What a run folder holds: its manifest and curves, and the page and table made of them.

It reads files, and imports neither torch nor Lightning, so that a report takes no second to start.
"""
