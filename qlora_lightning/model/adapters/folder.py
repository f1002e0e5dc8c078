"""The adapter folder: written whole or not at all, read, and its tensors put on a base, checked."""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_lightning.base.adapter_folder import read_identity
from qlora_lightning.model.adapters.identity import check_identity, describe_adapter
from qlora_lightning.model.adapters.lora import ADAPTER, check_fit, inject
from qlora_lightning.model.layers.fuse import fuse_layers
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import IDENTITY, flush, set_usual_mode, write_whole
from qlora_lightning.support.versions import FORMAT_VERSION, without_peft_warnings

UNFINISHED = ".writing"  # a folder inside: what a kill left of a save
_WEIGHTS = "adapter_model.safetensors"
_HASH = "sha256"  # a key of the weights' metadata
_OWN_STOPS = "stops_only_with_its_generation_config"  # a key of qlora_lightning.json
_CARD = """---
base_model: {base}
library_name: peft
tags: [lora, qlora]
---

# LoRA adapter for {base}

{loading}
"""
_LOADING = """Trained with qlora_lightning on the base quantized as {quantization}. Load it with plain PEFT, with
this folder's path or hub id in place of the dot:

```python
{snippet}
```"""


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_adapter_folder(
    folder: Path,
    model: peft.PeftModel,
    tokenizer: Any,
    identity: Mapping[str, Any],
    stop_ids: Sequence[int] = (),
) -> None:
    """Write weights (safetensors, fp32), PEFT config, tokenizer, chat template, identity and a card, without network.

    A reader never finds half a file, nor the files of two adapters. With the tokenizer goes a
    ``generation_config.json``: the base's, with every token at which generation stops.

    Args:
        folder: Where to; it may hold an earlier adapter, and files of the user's, which stay.
        model: The model with the adapter: of several the one that trains, else the first, ``default``.
        tokenizer: Saved beside, with its chat template; may be ``None``.
        identity: Written as ``qlora_lightning.json``: base, quantization, the adapter's shape, data.
        stop_ids: Tokens at which generation stops, beside the tokenizer's end-of-sequence token and the base's own.
    """
    identity = {"format_version": FORMAT_VERSION, **identity}
    by_adapter = {name: _tensors_by_key(model, name) for name in model.peft_config}
    trained = [name for name, found in by_adapter.items() if any(each.requires_grad for each in found.values())]
    adapter = trained[0] if len(trained) == 1 else ADAPTER
    if adapter != ADAPTER and "adapter" in identity:  # it is that of the model as it was made
        identity["adapter"] = describe_adapter(model, adapter)
    generation: dict[str, Any] = {}
    if tokenizer is not None:
        generation, known_to_base = _generation_config(model, tokenizer, stop_ids)
        identity |= {} if known_to_base else {_OWN_STOPS: True}
    # copies: tied tensors share memory, which the format refuses
    weights = {key: each.detach().float().cpu().clone().contiguous() for key, each in by_adapter[adapter].items()}
    config = copy.copy(model.peft_config[adapter])
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set: its order would differ from run to run
    config.inference_mode = True  # as PEFT writes it: who loads the folder uses it, unless asked to train

    def write(place: Path) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
            write_whole(place / "generation_config.json", generation)
        config.save_pretrained(place)
        (place / "README.md").write_text(_card(identity, config.task_type), encoding="utf-8")
        write_whole(place / IDENTITY, identity)
        _save_tensors(weights, place / _WEIGHTS)

    refill_folder(folder, write, key_file=_WEIGHTS, own=("chat_template.jinja", "generation_config.json"))


def refill_folder(folder: Path, write: Callable[[Path], None], key_file: str, own: Collection[str] = ()) -> None:
    """Let ``write`` fill a folder beside, and bring its files into ``folder`` when all of them are on the disk.

    If only ``key_file`` differs from what is there, it alone is replaced, in one rename. If other files do too, it goes
    first and comes last: a kill between leaves a folder that no reader takes for an adapter.

    Args:
        folder: What to fill; made if it is not there.
        write: Fills the folder that it is given.
        key_file: The file without which the others are worth nothing.
        own: Names that an earlier filling may have written; they go if this one does not write them.

    Raises:
        OSError: The disk is full or fails; the folder is as it was.
    """
    staging = folder / UNFINISHED
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    write(staging)
    files = {str(file.relative_to(staging)): file for file in staging.rglob("*") if file.is_file()}
    for file in files.values():
        flush(file)
    stale = [folder / name for name in own if name not in files and (folder / name).exists()]
    changed = [name for name, file in files.items() if name != key_file and not _equal(file, folder / name)]
    if stale or changed:
        (folder / key_file).unlink(missing_ok=True)
        flush(folder)
    for file in stale:
        file.unlink()
    for name in [*changed, key_file]:
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(files[name], folder / name)
    shutil.rmtree(staging)
    flush(folder)
    flush(folder.parent)


def _equal(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _card(identity: Mapping[str, Any], task_type: str | None) -> str:
    """Return the ``README.md``, which names no path, so that the folder can be moved and uploaded as it is."""
    snippet = loading_snippet(".", identity)
    loading = explain_other_task(task_type) or _LOADING.format(quantization=identity["quantization"], snippet=snippet)
    return _CARD.format(base=identity["base"], loading=loading)


def explain_other_task(task_type: str | None) -> str:
    """Say how an adapter of another task is loaded; empty for a causal language model: see :func:`loading_snippet`."""
    if task_type in (None, peft.TaskType.CAUSAL_LM):
        return ""
    name = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task_type].__name__
    return f"Load it with PEFT's {name} onto a base of that kind."


def loading_snippet(folder: Path | str, identity: Mapping[str, Any]) -> str:
    """Return three lines of Python that load the adapter with plain PEFT onto the base as it was trained.

    PEFT takes the generation config from the base and not from the adapter folder: if the base's lacks a stop token
    (a base model trained to chat), the second line hands over the folder's, or the model would never stop.
    """
    dtype, quantization = identity.get("compute_dtype", "bfloat16"), identity["quantization"]
    four_bits = (
        f'load_in_4bit=True, bnb_4bit_quant_type="{quantization}", '
        f'bnb_4bit_use_double_quant={identity.get("double_quant", True)}, bnb_4bit_compute_dtype="{dtype}"'
    )
    place = json.dumps(str(folder))
    settings = {"none": "", "int8": "load_in_8bit=True"}.get(quantization, four_bits)
    quantize = f", quantization_config=BitsAndBytesConfig({settings})" if settings else ""
    stops = f", generation_config=GenerationConfig.from_pretrained({place})" if identity.get(_OWN_STOPS) else ""
    names = "AutoTokenizer, BitsAndBytesConfig" + (", GenerationConfig" if stops else "")
    return (
        f"from peft import AutoPeftModelForCausalLM; from transformers import {names}\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained({place}, dtype="{dtype}"{quantize}{stops})\n'
        f"tokenizer = AutoTokenizer.from_pretrained({place})"
    )


def _generation_config(model: peft.PeftModel, tokenizer: Any, stop_ids: Sequence[int]) -> tuple[dict[str, Any], bool]:
    """Return the generation config to write, and whether the base's own knows all of its stop tokens."""
    base = getattr(model.get_base_model(), "generation_config", None)
    settings: dict[str, Any] = {} if base is None else json.loads(base.to_json_string(ignore_metadata=True))
    known = settings.get("eos_token_id")
    known = known if isinstance(known, list) else [known]
    # the first is the token that ends an assistant turn, if that is the tokenizer's, as it is with a chosen template
    stops = [number for number in dict.fromkeys([tokenizer.eos_token_id, *stop_ids, *known]) if number is not None]
    own = {"eos_token_id": stops, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings.update({name: value for name, value in own.items() if value not in (None, [])})
    return settings, set(stops) <= set(known)


def _save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write tensors as safetensors, with their hash in the file's metadata: one rename replaces both.

    PEFT's ``save_pretrained`` leaves the hash out, so that an adapter which was trained further by it is not called
    damaged. Equal tensors give equal files.
    """
    save_file(tensors, file, {"format": "pt", _HASH: _hash_tensors(tensors)})
    set_usual_mode(file)
    with file.open("r+b") as stream:  # safetensors writes the metadata in an order that differs from run to run
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        stream.seek(8)
        stream.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and numbers, whatever their order."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter folder, by PEFT's names.

    They are refused if they are cut off, do not match their hash, or are not finite: every answer would be nonsense.
    """
    file = folder / _WEIGHTS
    try:
        with safe_open(file, framework="pt") as opened:
            expected = (opened.metadata() or {}).get(_HASH)  # other tools write none
            names = opened.keys()
            tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise UserError(
            f"{file} is not a whole safetensors file, but cut off or damaged ({error}). Copy the adapter folder again."
        ) from error
    if expected is not None and _hash_tensors(tensors) != expected:
        raise UserError(
            f"{file} is damaged: its tensors do not match the hash in its metadata. Copy the adapter folder again."
        )
    for name, tensor in tensors.items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise UserError(
                f"The adapter folder {folder} is damaged: {bad:,} of {tensor.numel():,} values of {name} are NaN or "
                "infinite. Copy the folder again, or train again with a lower learning rate."
            )
    return tensors


def read_lora_config(folder: Path) -> peft.LoraConfig:
    """Read PEFT's config of an adapter folder, to train it."""
    read_identity(folder)  # reports what is missing or damaged
    config: peft.LoraConfig = peft.LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    return config


def open_adapter_folder(base: PreTrainedModel, folder: Path) -> peft.PeftModel:
    """Put the adapter of a folder on the base, to train it further; every tensor must find its place.

    On a base on the meta device the adapter's own tensors are real all the same.
    """
    model = inject(base, read_lora_config(folder))
    fill_adapter(model, folder)
    return model


def fill_adapter(model: Any, folder: Path, name: str = ADAPTER) -> None:
    """Set an adapter of a model of PEFT, however it was made, to a folder's tensors; every one must find its place."""
    stored, own = read_tensors(folder), _tensors_by_key(model, name)
    check_fit(own, stored, f"The adapter folder {folder}")
    with torch.no_grad():
        for key, tensor in own.items():
            if tensor.is_meta:
                torch.utils.swap_tensors(tensor, nn.Parameter(stored[key].float()))  # type: ignore[no-untyped-call]
            else:
                tensor.copy_(stored[key])


def add_named_adapter(
    model: peft.PeftModel, name: str, folder: Path, identity: Mapping[str, Any], fast: bool = True
) -> bool:
    """Put the adapter of a folder beside those that a model has; ``model.set_adapter(name)`` then switches to it.

    ``identity`` is the base's. Returns whether all linears of the adapter run fused; the others need autocast.
    """
    of_base = {key: value for key, value in identity.items() if key != "adapter"}  # its shape may be another
    check_identity(read_identity(folder), of_base, f"The adapter folder {folder}")
    with without_peft_warnings():
        model.add_adapter(name, read_lora_config(folder))
    fill_adapter(model, folder, name)
    return fast and not any(fuse_layers(model).linears.values())


def _tensors_by_key(model: peft.PeftModel, adapter: str) -> dict[str, Tensor]:
    """Find the tensors of an adapter by the keys that they have in a file: PEFT's, without the adapter's name."""
    named = model.named_parameters(remove_duplicate=False)
    own: dict[str, Any] = {
        name: tensor
        for name, tensor in named
        if adapter in name.split(".")[-2:] or f".modules_to_save.{adapter}." in name
    }
    # the explicit state dict keeps PEFT from walking the quantized base, the flag from asking the hub
    found: dict[str, Tensor] = peft.get_peft_model_state_dict(
        model, state_dict=own, adapter_name=adapter, save_embedding_layers=False
    )
    return found
