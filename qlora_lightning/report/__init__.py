"""What a run folder holds, and the page made of it; without torch and Lightning, so that it starts within a second."""

from qlora_lightning.report.page import render_report as render_report
from qlora_lightning.report.page import write_run_page as write_run_page
from qlora_lightning.report.run_files import Run as Run
from qlora_lightning.report.run_files import read_manifest as read_manifest
from qlora_lightning.report.run_files import read_metrics as read_metrics
from qlora_lightning.report.run_files import read_run as read_run
from qlora_lightning.report.run_files import write_manifest as write_manifest
