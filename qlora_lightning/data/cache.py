"""Samples kept in the user's cache, and what data, tokenizer and template are, as short hashes."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import transformers

import qlora_lightning
from qlora_lightning.base.cache import cached_folder
from qlora_lightning.data.chat.tokenizer import hash_tokenizer
from qlora_lightning.data.prepare import Prepared
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.readers import hash_source
from qlora_lightning.data.rows.sources import Source
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.support.errors import UserError

_log = logging.getLogger(__name__)
_LAYOUT = 8  # of what is stored; counts up when the same rows would give other samples, or would be refused


def identify(samples: Mapping[str, SampleSet], tokenizer: Any) -> dict[str, Any]:
    """Hash each split's samples as they are trained on, the tokenizer without its template, and the template."""
    found: dict[str, Any] = {split: samples[split].content_hash for split in ("train", "val") if split in samples}
    if found:
        found["samples"] = {split: len(samples[split]) for split in found}
    found["tokenizer"] = hash_tokenizer(tokenizer, with_template=False)
    template = tokenizer.chat_template  # a text, or several by name
    if template is not None:
        text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
        found["chat_template"] = hashlib.sha256(text.encode()).hexdigest()
    return found


def describe_sources(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Return all that the rows of sources depend on: what a key holds of them."""
    return [
        {
            "path": source.path,
            "files": [str(file) for file in source.files],
            "hash": hash_source(source),
            "read": repr([source.split, source.name, source.revision, source.data_files]),  # the hash tells the rest
            "settings": repr(source.settings),
        }
        for source in sources
    ]


def cached_samples(key: Mapping[str, Any], label: str, prepare: Callable[[], Prepared]) -> Prepared:
    """Return what ``prepare`` makes, from the cache if it was made before, mapped into memory.

    The key is everything that the samples depend on; the label is for ``qlora-lightning cache list``. If the cache
    cannot be written, the samples stay in memory.
    """
    made: list[Prepared] = []
    begun = False

    def build(folder: Path) -> None:
        nonlocal begun
        begun = True
        samples, report = prepare()
        made.append((samples, report))
        samples.save(folder)
        (folder / "report.json").write_text(json.dumps(asdict(report), ensure_ascii=False), encoding="utf-8")

    versions = {
        "layout": _LAYOUT,
        "qlora_lightning": qlora_lightning.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    try:
        folder = cached_folder("samples", {**key, **versions}, build, label)
    except UserError as error:
        if begun and not made:  # what `prepare` raised of the rows
            raise
        _log.warning("The samples of %s are not kept for the next start: %s", label, error)
        return made[0] if made else prepare()
    report = Report.from_dict(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    return SampleSet.load(folder), report
