"""What samples, tokenizer and chat template are, as short hashes: what a checkpoint remembers of its data."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from qlora_lightning.data.chat.tokenizers import hash_tokenizer
from qlora_lightning.data.samples.sample_set import SampleSet

_hashes: WeakKeyDictionary[SampleSet, str] = WeakKeyDictionary()  # a gigabyte of tokens takes a second: once


def identify(samples: Mapping[str, SampleSet], tokenizer: Any) -> dict[str, Any]:
    """Hash each split's samples, the tokenizer without its template, and the template.

    Samples are hashed as they are trained on, tokens and labels in file order: whatever changes none of them (another
    place of the file, another version of a library) changes no hash.

    Args:
        samples: of ``train`` and ``val``, as far as there are any.
        tokenizer: with its template; one of which it cannot be told what it consists of is left out.
    """
    found: dict[str, Any] = {split: hash_samples(samples[split]) for split in ("train", "val") if split in samples}
    if found:
        found["samples"] = {split: len(samples[split]) for split in found}
    hashed = hash_tokenizer(tokenizer, with_template=False)
    if hashed is not None:
        found["tokenizer"] = hashed
    template = tokenizer.chat_template  # a text, or several by name
    if template is not None:
        text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
        found["chat_template"] = hashlib.sha256(text.encode()).hexdigest()
    return found


def hash_samples(samples: SampleSet) -> str:
    """Hash tokens, labels and order of samples, and which source each comes from; kept as long as they are."""
    if samples not in _hashes:
        total = hashlib.sha256()
        for values in (samples.starts, samples.ids, samples.labelled, samples.source):
            total.update(values.data)
        _hashes[samples] = total.hexdigest()
    return _hashes[samples]
