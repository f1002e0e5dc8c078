"""Samples in the user's cache, and hashes of data, tokenizer and template."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tokenizers
import transformers

import qlora_lightning.data
from qlora_lightning.data.prepare import Prepared
from qlora_lightning.data.report import DataReport
from qlora_lightning.data.rows.files import Source, hash_source
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.sources.cache import cached_folder


def identify(samples: Mapping[str, SampleSet], tokenizer: Any) -> dict[str, Any]:
    """Hash each split's samples as they are trained on, the tokenizer without its template, and the template."""
    hashes: dict[str, Any] = {split: samples[split].content_hash for split in ("train", "val") if split in samples}
    if hashes:
        hashes["samples"] = {split: len(samples[split]) for split in hashes}
    parts = [None, tokenizer.backend_tokenizer.to_str(), None, tokenizer.special_tokens_map]  # as checkpoints have it
    hashes["tokenizer"] = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    template = tokenizer.chat_template  # a text, or several by name
    if template is not None:
        text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
        hashes["chat_template"] = hashlib.sha256(text.encode()).hexdigest()
    return hashes


def _hash_code() -> str:
    """Hash the files of this folder, templates included, which make samples of rows."""
    folder, digest = Path(str(qlora_lightning.data.__file__)).parent, hashlib.sha256()
    for file in sorted([*folder.rglob("*.py"), *folder.rglob("*.jinja")]):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()


def can_be_kept(source: Source) -> bool:
    """Whether the samples of a source can be cached.

    Not those of a user's function, which may depend on anything, nor those of a URL, whose content may change.
    """
    is_function = not isinstance(source.format, str) or "." in source.format
    return not is_function and not any(isinstance(file, str) for file in source.files)


def cached_samples(sources: Sequence[Source], settings: Mapping[str, Any], prepare: Callable[[], Prepared]) -> Prepared:
    """Return what ``prepare`` returns, from the cache if it is there, mapped into memory.

    The samples depend on sources and settings alone.
    """
    key = {
        "sources": [[repr(replace(source, weight=None)), hash_source(source)] for source in sources],
        "settings": json.dumps(settings, sort_keys=True, default=str),
        "code": _hash_code(),
        "qlora_lightning": qlora_lightning.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }

    def build(folder: Path) -> None:
        samples, report = prepare()
        samples.save(folder)
        (folder / "report.json").write_text(json.dumps(asdict(report)), encoding="utf-8")

    folder = cached_folder("samples", key, build, ", ".join(source.path for source in sources))
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return SampleSet.load(folder), DataReport(**report)
