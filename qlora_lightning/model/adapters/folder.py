"""Writes the adapter folder, whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
from torch import Tensor

from qlora_lightning.model.adapters.reading import save_tensors
from qlora_lightning.support.files import flush, set_usual_mode
from qlora_lightning.support.versions import FORMAT_VERSION

_STAGING = ".writing"


def refill_folder(folder: Path, write: Callable[[Path], Any], key_file: str, own: Collection[str] = ()) -> None:
    """Let ``write`` fill a folder beside, and bring its files into ``folder`` when all of them are on the disk.

    Where only ``key_file`` differs from what is there, it alone is replaced, in one rename. Where others do too, the
    whole folder is, in two, and :func:`settle_folder` mends what a kill between them leaves. Files of the user's stay.

    Args:
        folder: What to fill; made if it is not there.
        write: Fills the folder that it is given.
        key_file: The file without which the others are worth nothing.
        own: Names that an earlier filling may have written; they go where this one does not write them.

    Raises:
        OSError: The disk is full or fails; the folder is as it was.
    """
    folder = Path(os.path.realpath(folder))  # where the user has it elsewhere, by a link
    settle_folder(folder)
    staging = folder / _STAGING
    staging.mkdir(parents=True)
    write(staging)
    files = sorted(staging.iterdir())
    for file in [*files, staging]:
        flush(file)
    others = [file for file in files if file.name != key_file]
    stale = {name for name in own if (folder / name).exists()} - {file.name for file in files}
    alike = not stale and all(_equal(file, folder / file.name) for file in others)
    if alike or not (folder / key_file).exists():
        for name in stale:
            (folder / name).unlink()
        for file in [*others, staging / key_file]:
            os.replace(file, folder / file.name)
        staging.rmdir()
    else:
        new, old = _beside(folder)
        os.replace(staging, new)
        os.replace(folder, old)
        os.replace(new, folder)
        for name in stale:
            (old / name).unlink()
        _finish(folder, old)
    flush(folder)
    flush(folder.parent)


def settle_folder(folder: Path) -> None:
    """Put right what a kill inside :func:`refill_folder` left; does nothing where there is nothing to do."""
    folder = Path(os.path.realpath(folder))
    new, old = _beside(folder)
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    elif old.exists():
        _finish(folder, old)
    for place in (new, folder / _STAGING):
        if place.exists():
            shutil.rmtree(place)


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")


def _finish(folder: Path, old: Path) -> None:
    """Take over what is the user's, and drop the rest of the old folder."""
    for entry in sorted(old.iterdir()):
        if not (folder / entry.name).exists():
            os.replace(entry, folder / entry.name)
    shutil.rmtree(old)


def _equal(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


_WEIGHTS = "adapter_model.safetensors"
OWN_STOPS = "stops_only_with_its_generation_config"  # a key of qlora_lightning.json
CARD = """---
base_model: {base}
library_name: peft
tags: [lora, qlora]
---

# LoRA adapter for {base}

Trained with qlora_lightning on the base quantized as {quantization}. Load it with plain PEFT:

```python
{snippet}
```
"""


def save_adapter_folder(
    folder: Path,
    model: peft.PeftModel,
    tensors: Mapping[str, Tensor],
    tokenizer: Any,
    identity: Mapping[str, Any],
    stop_ids: Sequence[int] = (),
) -> None:
    """Write weights (safetensors, fp32), PEFT config, tokenizer, chat template, identity and a card, without network.

    All are written beside and then brought in, the weights last: a reader never finds half a file, nor the files of
    two adapters. With the tokenizer goes a ``generation_config.json``: the base's, with every token at which generation
    stops.

    Args:
        folder: Where to; it may hold an earlier adapter of the same run.
        model: The model with the adapter.
        tensors: The adapter's tensors by the model's names, tied ones under each of their names.
        tokenizer: Saved beside, with its chat template; may be ``None``.
        identity: Written as ``qlora_lightning.json``: base, quantization, the adapter's shape, data.
        stop_ids: Tokens at which generation stops, beside the tokenizer's end-of-sequence token and the base's own.
    """
    identity = {"format_version": FORMAT_VERSION, **identity}
    generation: dict[str, Any] | None = None
    if tokenizer is not None:
        generation, complete = _generation_config(model, tokenizer, stop_ids)
        if not complete:
            identity[OWN_STOPS] = True
    # The explicit state dict keeps PEFT from walking the quantized base, the flag from asking the hub.
    weights = peft.get_peft_model_state_dict(model, state_dict=dict(tensors), save_embedding_layers=False)
    # copies: tied tensors share memory, which the format refuses
    weights = {name: tensor.detach().float().cpu().clone().contiguous() for name, tensor in weights.items()}
    card = describe_card(folder, identity)

    def write(place: Path) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        if generation is not None:
            _write_json(place / "generation_config.json", generation)
        _saved_config(model).save_pretrained(place)
        (place / "README.md").write_text(card, encoding="utf-8")
        _write_json(place / "qlora_lightning.json", identity)
        save_tensors(weights, place / _WEIGHTS)
        set_usual_mode(place / _WEIGHTS)

    refill_folder(folder, write, key_file=_WEIGHTS, own=("chat_template.jinja", "generation_config.json"))


def describe_card(folder: Path | str, identity: Mapping[str, Any]) -> str:
    """Give the card, ``README.md``, of an adapter that is loaded from ``folder``, which may be a hub id."""
    snippet = loading_snippet(folder, identity)
    return CARD.format(base=identity["base"], quantization=identity["quantization"], snippet=snippet)


def loading_snippet(folder: Path | str, identity: Mapping[str, Any]) -> str:
    """Give three lines of Python that load the adapter with plain PEFT onto the base as it was trained.

    PEFT takes the generation config from the base and not from the adapter folder: where the base's lacks a stop token
    (a base model trained to chat), the second line hands over the folder's, or the model would never stop.

    Args:
        folder: The adapter folder.
        identity: What :func:`qlora_lightning.base.adapter_folder.read_identity` gives of it.
    """
    dtype, quantization = identity.get("compute_dtype", "bfloat16"), identity["quantization"]
    four_bits = (
        f'load_in_4bit=True, bnb_4bit_quant_type="{quantization}", '
        f'bnb_4bit_use_double_quant={identity.get("double_quant", True)}, bnb_4bit_compute_dtype="{dtype}"'
    )
    place = json.dumps(str(folder))
    settings = {"none": "", "int8": "load_in_8bit=True"}.get(quantization, four_bits)
    quantize = f", quantization_config=BitsAndBytesConfig({settings})" if settings else ""
    stops = f", generation_config=GenerationConfig.from_pretrained({place})" if identity.get(OWN_STOPS) else ""
    names = "AutoTokenizer, BitsAndBytesConfig" + (", GenerationConfig" if stops else "")
    return (
        f"from peft import AutoPeftModelForCausalLM; from transformers import {names}\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained({place}, dtype="{dtype}"{quantize}{stops})\n'
        f"tokenizer = AutoTokenizer.from_pretrained({place})"
    )


def _generation_config(model: peft.PeftModel, tokenizer: Any, stop_ids: Sequence[int]) -> tuple[dict[str, Any], bool]:
    """Give the generation config to write, and whether the base's own knows all of its stop tokens."""
    base = getattr(model.get_base_model(), "generation_config", None)
    settings: dict[str, Any] = {} if base is None else json.loads(base.to_json_string(ignore_metadata=True))
    known = settings.get("eos_token_id")
    known = known if isinstance(known, list) else [known]
    # the first is the token that ends an assistant turn, if that is the tokenizer's, as it is with a chosen template
    stops = [number for number in dict.fromkeys([tokenizer.eos_token_id, *stop_ids, *known]) if number is not None]
    own = {"eos_token_id": stops, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings.update({name: value for name, value in own.items() if value not in (None, [])})
    return settings, set(stops) <= set(known)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _saved_config(model: peft.PeftModel) -> peft.PeftConfig:
    config = model.peft_config["default"]
    saved = type(config)(**{name: value for name, value in config.to_dict().items() if name != "auto_mapping"})
    if not isinstance(saved.target_modules, str):
        saved.target_modules = sorted(saved.target_modules)  # a set: its order would differ from run to run
    saved.inference_mode = True  # as PEFT writes it: who loads the folder uses it, unless asked to train
    return saved
