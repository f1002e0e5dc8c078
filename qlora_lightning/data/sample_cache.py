"""Samples kept in the user's cache, and what data, tokenizer and template are, as short hashes."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tokenizers
import transformers

import qlora_lightning
from qlora_lightning.base.cache import cached_folder
from qlora_lightning.data.data_report import DataReport
from qlora_lightning.data.prepare import Prepared
from qlora_lightning.data.rows.readers import hash_source
from qlora_lightning.data.rows.sources import Source
from qlora_lightning.data.samples import SampleSet

_LAYOUT = 9  # of what is stored; counts up when the same rows would give other samples, or would be refused


def identify(samples: Mapping[str, SampleSet], tokenizer: Any) -> dict[str, Any]:
    """Hash each split's samples as they are trained on, the tokenizer without its template, and the template."""
    found: dict[str, Any] = {split: samples[split].content_hash for split in ("train", "val") if split in samples}
    if found:
        found["samples"] = {split: len(samples[split]) for split in found}
    parts = [None, tokenizer.backend_tokenizer.to_str(), None, tokenizer.special_tokens_map]  # as checkpoints have it
    found["tokenizer"] = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    template = tokenizer.chat_template  # a text, or several by name
    if template is not None:
        text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
        found["chat_template"] = hashlib.sha256(text.encode()).hexdigest()
    return found


def can_be_kept(source: Source) -> bool:
    """Whether it is known what the rows of a source depend on.

    A function of the user's may depend on anything, and only a download tells what is behind a URL.
    """
    return "." not in source.settings.format and not any(isinstance(file, str) for file in source.files)


def cached_samples(sources: Sequence[Source], settings: Mapping[str, Any], prepare: Callable[[], Prepared]) -> Prepared:
    """Return what ``prepare`` makes, from the cache if it was made before, mapped into memory.

    Sources and settings are everything that the samples depend on.
    """
    key = {
        "sources": [[repr(replace(source, weight=None)), hash_source(source)] for source in sources],
        "settings": json.dumps(settings, sort_keys=True, default=str),
        "layout": _LAYOUT,
        "qlora_lightning": qlora_lightning.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }

    def build(folder: Path) -> None:
        samples, report = prepare()
        samples.save(folder)
        (folder / "report.json").write_text(json.dumps(asdict(report), ensure_ascii=False), encoding="utf-8")

    folder = cached_folder("samples", key, build, ", ".join(source.path for source in sources))
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return SampleSet.load(folder), DataReport(**report)
