"""Metrics as people read their names."""

_WORDS = {"rouge_l": "ROUGE-L", "chrf": "chrF++", "json_f1": "JSON field F1", "json_valid": "valid JSON"}


def describe_metric(name: str) -> str:
    """Give a metric's name as people read it."""
    return _WORDS.get(name, name.replace("_", " "))
