"""What a run folder holds: its manifest and curves, and the page and table made of them.

A leaf like ``base``: it reads files and knows neither torch nor Lightning, so that a report takes no second to start.
"""
