"""Rows as files of JSON lines, and other files of JSON."""

import json


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def change_json(file, **values):
    """Write a file with other values of its keys."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def counting_rows(count=16):
    """Short, ragged rows, each of which counts one further than the one before it."""
    return [
        {"instruction": f"Count to {n}." + " Please." * (n % 4), "output": " ".join(map(str, range(1, n + 1)))}
        for n in range(1, count + 1)
    ]
