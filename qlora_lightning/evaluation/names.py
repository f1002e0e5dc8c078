"""Metrics and rows in words."""

_WORDS = {"rouge_l": "ROUGE-L", "chrf": "chrF++", "json_f1": "JSON field F1", "json_valid": "valid JSON"}


def describe_metric(name: str) -> str:
    """Give a metric's name as people read it."""
    return _WORDS.get(name, name.replace("_", " "))


def describe_answered(answered: int, rows: int) -> str:
    """Say behind a number of rows how many of them were answered; nothing where it was all of them, or none."""
    return f", {answered:,} of them answered" if 0 < answered < rows else ""
