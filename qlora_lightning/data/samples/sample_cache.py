"""Samples kept in the user's cache, found again by everything that they were made from."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import transformers

import qlora_lightning
from qlora_lightning.base.cache import cached_folder
from qlora_lightning.data.reading.reader import fingerprint
from qlora_lightning.data.reading.sources import Source
from qlora_lightning.data.samples.report import Report
from qlora_lightning.data.samples.sample_set import SampleSet
from qlora_lightning.support.errors import UserError

_log = logging.getLogger(__name__)
_LAYOUT = 3  # of what is stored; counts up when the same rows would give other samples, or would be refused

Prepared = tuple[SampleSet, Report]


def cached_samples(key: Mapping[str, Any], label: str, prepare: Callable[[], Prepared]) -> Prepared:
    """Return what ``prepare`` makes, from the cache where it was made before, mapped into memory.

    Processes that ask at once prepare once; a killed one leaves nothing that counts. Where the cache cannot be written,
    the samples stay in memory.

    Args:
        key: everything that they depend on.
        label: what they are, for ``qlora-lightning cache list``.
        prepare: makes samples and report.

    Raises:
        UserError: what ``prepare`` raises.
    """
    made: list[Prepared] = []
    asked: list[bool] = []

    def build(folder: Path) -> None:
        asked.append(True)
        samples, report = prepare()
        made.append((samples, report))
        samples.save(folder)
        (folder / "report.json").write_text(json.dumps(report.as_dict(), ensure_ascii=False), encoding="utf-8")

    versions = {
        "layout": _LAYOUT,
        "qlora_lightning": qlora_lightning.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    try:
        folder = cached_folder("samples", {**key, **versions}, build, label)
    except UserError as error:
        if asked and not made:  # what `prepare` said of the rows
            raise
        _log.warning("The samples of %s are not kept for the next start: %s", label, error)
        return made[0] if made else prepare()
    report = Report.from_dict(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    return SampleSet.load(folder), report


def describe_sources(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Return names and content of sources: what a key holds of them."""
    return [
        {"path": source.path, "files": [str(file) for file in source.files], "hash": fingerprint(source)}
        for source in sources
    ]
