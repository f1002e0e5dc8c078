"""What a run folder holds: its manifest and curves, and the page and table made of them.

It reads files, and imports neither torch nor Lightning, so that a report takes no second to start.
"""

from qlora_lightning.report.page import render_report, write_run_page
from qlora_lightning.report.run_files import Run, read_manifest, read_metrics, read_run, write_manifest

__all__ = [
    "Run",
    "read_manifest",
    "read_metrics",
    "read_run",
    "render_report",
    "write_manifest",
    "write_run_page",
]
