"""Scores of answers that should be JSON: is it JSON, and how many fields are right."""

import json
from collections.abc import Iterator
from typing import Any


def parse_json(text: str) -> dict[str, Any] | list[Any] | None:
    """Parse an answer that is a JSON object or array and nothing else; ``None`` of any other."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):  # a model that runs on may open brackets without end
        return None
    return value if isinstance(value, dict | list) else None


def json_valid(answer: str, expected: str) -> float:
    """Give 1 if the answer is a JSON object or array and nothing else."""
    return float(parse_json(answer) is not None)


def json_f1(answer: str, expected: str) -> float:
    """Give the F1 of fields: of all leaves ``path: value``, those that answer and reference share.

    Order of keys does not count. An answer that is not JSON has no field right.
    """
    found, wanted = parse_json(answer), parse_json(expected)
    if found is None or wanted is None:
        return 0.0
    fields, reference = set(_leaves(found)), set(_leaves(wanted))
    return 2 * len(fields & reference) / (len(fields) + len(reference))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield each leaf as its path and its value as JSON; an empty object or array is a leaf."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{json.dumps(key)}")
    elif isinstance(value, list) and value:
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{place}]")
    else:
        whole = isinstance(value, float) and value.is_integer()
        yield path, json.dumps(int(value) if whole else value)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
