"""Rows as files of JSON lines."""

import json


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def counting_rows(count=16):
    """Short, ragged rows, each of which counts one further than the one before it."""
    return [
        {"instruction": f"Count to {n}." + " Please." * (n % 4), "output": " ".join(map(str, range(1, n + 1)))}
        for n in range(1, count + 1)
    ]
