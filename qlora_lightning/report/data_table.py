"""What became of the rows, as a table, and what is to be looked at in them."""

from collections.abc import Mapping
from typing import Any

from qlora_lightning.report.run import Run


def data_rows(run: Run) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Give the splits, and under each heading the count of each; reasons for which rows were left out are indented."""
    splits: Mapping[str, Any] = (run.manifest.get("data") or {}).get("splits") or {}
    reports = list(splits.values())
    if not reports:
        return [], []
    reasons = dict.fromkeys(reason for report in reports for reason in report.get("dropped") or {})
    rows = [("rows read", [f"{report['rows']:,}" for report in reports])]
    if any(report["bad_rows"] for report in reports):
        rows.append(("  − bad rows", [f"{report['bad_rows']:,}" for report in reports]))
    for reason in reasons:
        rows.append((f"  − {reason}", [f"{(report.get('dropped') or {}).get(reason, 0):,}" for report in reports]))
    rows.append(("samples", [f"{report['samples']:,}" for report in reports]))
    rows.append(("tokens", [f"{report['tokens']:,}" for report in reports]))
    rows.append(("labelled tokens", [_share(report["labelled"], report["tokens"]) for report in reports]))
    for name, heading in (
        ("shortened", "samples cut to max_length"),
        ("lost_labels", "labelled tokens cut away"),
        ("duplicates", "rows equal to an earlier one"),
        ("overlap", "rows that are trained on too"),
    ):
        if any(report[name] for report in reports):
            rows.append((heading, [f"{report[name]:,}" for report in reports]))
    return list(splits), rows


def data_warnings(run: Run) -> list[str]:
    """Give a sentence for each thing in the data that makes results doubtful."""
    splits: Mapping[str, Any] = (run.manifest.get("data") or {}).get("splits") or {}
    lines = []
    for split, report in splits.items():
        if report["bad_rows"]:
            lines.append(f"{report['bad_rows']:,} bad rows of {split} were left out.")
        if report["overlap"]:
            lines.append(f"{report['overlap']:,} rows of {split} are trained on too: its loss is too good.")
        if report["lost_labels"]:
            lines.append(f"max_length cut {report['lost_labels']:,} labelled tokens away from {split}.")
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.0%})" if whole else f"{part:,}"
