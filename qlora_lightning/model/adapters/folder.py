"""Write the adapter folder completely or not at all, read it, and put its tensors on a base."""

import contextlib
import filecmp
import inspect
import itertools
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub import ModelCardData
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_lightning.model.adapters.identity import check_identity
from qlora_lightning.model.adapters.inject import (
    ADAPTER,
    KEEPS_DTYPES,
    OPTIONS,
    adapter_tensors,
    check_shapes,
    inject,
    new_lora_config,
    own_tensors,
    resolve_targets,
    trainable_tensors,
)
from qlora_lightning.model.adapters.names import by_full_names, config_in_folder, key_in_folder, settings_here
from qlora_lightning.model.layers.experts import PackedExperts
from qlora_lightning.model.layers.select import fuse_layers
from qlora_lightning.model.model_types import layer_of
from qlora_lightning.sources.folders import LORA_KEYS, read_adapter_config, read_identity
from qlora_lightning.sources.tensors import tensor_names
from qlora_lightning.support import files
from qlora_lightning.support.errors import UserError, bounded, explaining
from qlora_lightning.support.trainer import say_once

_WEIGHTS = "adapter_model.safetensors"
_CARD = """---
{metadata}
---

# LoRA adapter for {base}

Trained with qlora_lightning on the base quantized as {quantization}. Load it with plain PEFT, using
this folder's path or hub id in place of the dot:

```python
{snippet}
```
{note}"""
_EXTRA_NOTE = """
`extra.safetensors` contains {names}, trained along with the adapter. PEFT does not read it. A module of the same class
reads it with `adapter: FOLDER`.
"""
_EXPERTS_NOTE = """
The experts of this mixture were in {quantization} during training. These lines load them in 16 bits, as bitsandbytes
does. Loading them requires their full memory, and the generated text differs slightly.
"""
_STORED_NOTE = """
The base is published in {stored_as}, and was dequantized and held as {quantization} during training. These lines load
it in 16 bits, because transformers does not quantize it again. The generated text differs slightly.
"""
# transformers' configs that load bases published in fewer bits as 16 bits
_DEQUANTIZERS = {"fp8": "FineGrainedFP8Config", "compressed-tensors": "CompressedTensorsConfig", "mxfp4": "Mxfp4Config"}


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_adapter_folder(
    folder: Path,
    model: peft.PeftModel,
    tokenizer: Any,
    identity: Mapping[str, Any],
    stop_ids: Sequence[int] = (),
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the active adapter's weights (safetensors, fp32), PEFT config, tokenizer, identity and card.

    All files are written to a subfolder and then moved, the weights last. Between two saves of a run, only the weights
    differ. A kill then leaves one adapter or the other. If anything else differs, the old weights are deleted first. A
    kill then leaves a folder without weights, which every reader rejects.

    The folder may contain an earlier adapter and the user's own files. These files stay, so this function does not use
    ``files.replacing_folder``, which would remove them. The tokenizer is saved with its chat template and a
    ``generation_config.json``; it may be ``None``. The identity is saved as ``qlora_lightning.json``. Generation stops
    at ``stop_ids`` in addition to the stop tokens of the tokenizer and the base. ``extra`` holds tensors that are not
    part of the adapter; see :func:`~qlora_lightning.model.adapters.inject.own_tensors`.
    """
    staging = folder / ".writing"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    adapter = model.active_adapter
    if tokenizer is not None:
        with files.raising_os_errors():
            tokenizer.save_pretrained(staging)
        files.write_whole(staging / "generation_config.json", _generation_config(model, tokenizer, stop_ids))
    config = config_in_folder(model)
    config.inference_mode = True  # like PEFT: load for inference unless asked to train
    config.save_pretrained(staging)
    card = _describe(identity, config.task_type, model, extra or {})
    (staging / files.CARD).write_text(card, encoding="utf-8")
    files.write_whole(staging / files.IDENTITY, {"format_version": files.FORMAT_VERSION, **identity})
    # clone: tied tensors share memory, which the format rejects
    tensors = _tensors_by_key(model, adapter)
    weights = {key: tensor.detach().float().cpu().clone().contiguous() for key, tensor in tensors.items()}
    copies = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in (extra or {}).items()}
    for name, content in ((_WEIGHTS, weights), (files.EXTRA, copies)):
        if content:
            with files.raising_os_errors():
                save_file(content, staging / name, {"format": "pt"})
            files.set_usual_mode(staging / name)
    names = {file.relative_to(staging).as_posix() for file in staging.rglob("*") if file.is_file()}
    compared = names - {_WEIGHTS, files.CARD}  # the earlier adapter's card may include its evaluation
    _, changed, missing = filecmp.cmpfiles(staging, folder, compared, shallow=False)
    if changed or missing:
        (folder / _WEIGHTS).unlink(missing_ok=True)
    if tokenizer is not None and "chat_template.jinja" not in names:  # left by an earlier adapter
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    if not extra:
        (folder / files.EXTRA).unlink(missing_ok=True)
    for name in [*sorted(compared), files.CARD, _WEIGHTS]:
        (folder / name).parent.mkdir(exist_ok=True)  # several chat templates get their own folder
        files.put_in_place(staging / name, folder / name)
    shutil.rmtree(staging)
    files.flush(folder.parent)


def _describe(identity: Mapping[str, Any], task_type: str | None, model: nn.Module, extra: Mapping[str, Tensor]) -> str:
    """Return the adapter's card: metadata for the hub, and code that loads the folder with plain PEFT."""
    is_causal = task_type in (None, peft.TaskType.CAUSAL_LM)
    snippet = _loading_snippet(identity) if is_causal else f"# by PEFT's class for the task {task_type}"
    metadata = ModelCardData(
        base_model=identity["base"] if identity.get("revision") else None,  # only bases from the hub have a revision
        datasets=identity.get("data", {}).get("datasets") or None,
        library_name="peft",
        license=identity.get("license"),
        pipeline_tag="text-generation" if is_causal else None,
        tags=["lora", "qlora"],
    )
    has_packed_experts = any(isinstance(module, PackedExperts) for module in model.modules())
    note = _STORED_NOTE if identity.get("stored_as") else _EXPERTS_NOTE if has_packed_experts else ""
    note = note.format(**identity)
    note += _EXTRA_NOTE.format(names=", ".join(extra)) if extra else ""
    return _CARD.format(metadata=metadata, snippet=snippet, note=note, **identity)


def _loading_snippet(identity: Mapping[str, Any]) -> str:
    """Return three lines of Python that load the adapter with plain PEFT onto the base, in its form during training.

    The lines contain no path, so the folder can be moved and uploaded without changes. PEFT takes the generation config
    from the base, which may lack a stop token of the adapter's chat template. The second line therefore passes the
    folder's generation config.
    """
    dtype, settings = identity.get("compute_dtype", "bfloat16"), "load_in_8bit=True"
    if identity["quantization"] in ("nf4", "fp4"):
        settings = f'load_in_4bit=True, bnb_4bit_quant_type="{identity["quantization"]}", '
        settings += f'bnb_4bit_use_double_quant={identity.get("double_quant", True)}, bnb_4bit_compute_dtype="{dtype}"'
    options = f'dtype="{dtype}", generation_config=GenerationConfig.from_pretrained(".")'
    quantizer = _DEQUANTIZERS.get(identity.get("stored_as", ""), "BitsAndBytesConfig")
    if quantizer != "BitsAndBytesConfig":
        options += f", quantization_config={quantizer}(dequantize=True)"
    elif identity["quantization"] != "none":
        options += f", quantization_config=BitsAndBytesConfig({settings})"
    imports, classes = "AutoPeftModelForCausalLM", ""
    load = f'AutoPeftModelForCausalLM.from_pretrained(".", {options})'
    if identity.get("wrapper"):  # PEFT's own class would load only the text model, whose names differ
        imports, classes = "PeftConfig, PeftModel", "AutoModelForMultimodalLM, "
        base = 'PeftConfig.from_pretrained(".").base_model_name_or_path'
        load = f'PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained({base}, {options}), ".")'
    return (
        f"from peft import {imports}; from transformers import {classes}AutoTokenizer, {quantizer}, "
        "GenerationConfig\n"
        f"model = {load}\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")'
    )


def _generation_config(model: peft.PeftModel, tokenizer: Any, stop_ids: Sequence[int]) -> dict[str, Any]:
    """Return the base's generation config, with every token that stops generation."""
    base = getattr(model.get_base_model(), "generation_config", None)
    settings: dict[str, Any] = {} if base is None else json.loads(base.to_json_string(ignore_metadata=True))
    eos = settings.get("eos_token_id")
    # the tokenizer's token comes first: with a chosen chat template, it ends an assistant turn
    stops = dict.fromkeys([tokenizer.eos_token_id, *stop_ids, *(eos if isinstance(eos, list) else [eos])])
    stops.pop(None, None)
    tokens = {"eos_token_id": [*stops], "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return settings | {name: value for name, value in tokens.items() if value is not None}


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_lora_config(folder: Path, base_config: Any) -> peft.LoraConfig:
    """Read PEFT's config from an adapter folder, for training on a base with the transformers config ``base_config``.

    The names of the tensors tell which modules carry the adapter. The config may only have a regular expression.
    """
    stored = read_adapter_config(folder)
    settings: dict[str, Any] = {name: stored[name] for name in LORA_KEYS if stored.get(name) is not None}
    if str(init := settings.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise UserError(
            f"The adapter folder {folder} was initialized with {init}, for which PEFT changes the base's weights: it "
            "belongs to a different base than the one it names.",
            "init_lora_weights",
        )
    if init not in (True, False, "gaussian"):
        settings.pop("init_lora_weights", None)  # orthogonal requires an even rank; the folder has the values anyway
    message = f"{folder / 'adapter_config.json'} is not the config of a LoRA adapter"
    keys = tensor_names(folder / _WEIGHTS)
    with bounded(message, "adapter_config.json", explains=True):
        settings = settings_here(settings, keys, base_config)
    with explaining(message, "adapter_config.json"):
        return peft.LoraConfig(**settings)


def settings_of_folder(folder: Path, base: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the module settings, from ``rank`` to ``lora_options``, that describe a folder's adapter.

    If the user's setting describes the adapter, it is returned unchanged, such as ``all-linear`` or a list of these
    modules.

    Args:
        folder: The adapter folder.
        base: The base without adapters, on any device. If it is ``None``, because it is unknown until it is loaded,
            ``target_modules`` and ``layers`` are not compared.
        settings: The settings of the module.

    Raises:
        UserError: If a setting is not at its default and differs from the folder's.
    """
    config = read_lora_config(folder, None if base is None else base.config)
    defaults = {name: each.default for name, each in inspect.signature(new_lora_config).parameters.items()}
    settings = {name: settings.get(name, default) for name, default in defaults.items() if name != "base"}
    targets = set(config.target_modules or ())
    trained = {
        **settings,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "target_experts": bool(config.target_parameters),
    }
    if settings["alpha"] is None and config.lora_alpha == 2 * config.r:
        trained["alpha"] = None
    choice = settings["target_modules"], settings["layers"]
    if base is not None or choice == (defaults["target_modules"], defaults["layers"]):
        trained["target_modules"], trained["layers"] = _describe_targets(base, targets, *choice)
    options = {name: getattr(config, name) for name in OPTIONS if name != "init_lora_weights"}
    names = [*targets, *(config.target_parameters or ())]
    if _effect_of(options, base, names) != _effect_of(settings["lora_options"] or {}, base, names):
        trained["lora_options"] = {name: value for name, value in options.items() if value} or None
    for name, value in settings.items():
        if value not in (defaults[name], trained[name]):
            raise UserError(
                f"model.{name} is {value!r}, but the adapter in model.adapter ({folder}), which is trained further, "
                f"has {trained[name]!r}: leave out model.{name}, or leave out model.adapter for a new adapter.",
                f"model.{name}",
            )
    return trained


def _describe_targets(
    base: Any, targets: set[str], target_modules: str | list[str], layers: str | list[int]
) -> tuple[str | list[str], str | list[int]]:
    """Return ``target_modules`` and ``layers`` that choose the modules ``targets``, unchanged if possible."""
    full_names = sorted(targets) if base is None else [name for name, _ in base.named_modules() if name in targets]
    last_names = list(dict.fromkeys(name.rpartition(".")[2] for name in full_names))
    indices = sorted({layer for name in targets if (layer := layer_of(name)) is not None})
    if base is None:
        return last_names, indices
    for modules, chosen_layers in itertools.product((target_modules, last_names), (layers, "all", indices)):
        with contextlib.suppress(UserError):
            if set(resolve_targets(base, modules, chosen_layers)) == targets:
                return modules, chosen_layers  # the user's, if they choose the same modules
    return full_names, "all"


def _effect_of(options: Mapping[str, Any], base: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the effect of ``peft.LoraConfig`` options on the modules ``names`` of a folder's adapter, normalized."""
    effect = {name: value for name, value in options.items() if value and name != "init_lora_weights"}
    for key in {"rank_pattern", "alpha_pattern"} & effect.keys():
        effect[key] = by_full_names(effect[key], names)
    if base is not None and (endings := tuple(effect.get("modules_to_save", ()))):
        effect["modules_to_save"] = [name for name, _ in base.named_modules() if name.endswith(endings)]
    return effect


def fill_adapter(model: Any, folder: Path, name: str = ADAPTER) -> None:
    """Set a model's adapter to a folder's tensors; each must be finite and fit one of the model's."""
    tensors, stored = _tensors_by_key(model, name), load_file(folder / _WEIGHTS)
    check_shapes(tensors, stored, f"The adapter folder {folder}")
    for key, tensor in stored.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{folder} is damaged, or its training diverged: values of {key} are NaN or infinite.",
                "adapter.nan",
            )
    with torch.no_grad():
        for key, tensor in tensors.items():
            if tensor.is_meta:
                torch.utils.swap_tensors(tensor, nn.Parameter(stored[key].float()))  # type: ignore[no-untyped-call]
            else:
                tensor.copy_(stored[key])


def fill_own_tensors(module: nn.Module, folder: Path, filled: Collection[str], is_last: bool) -> set[str]:
    """Set a subclass's tensors outside its model from an adapter folder, except those already ``filled``.

    On the last call (``is_last``), a line is printed if only the subclass or only the folder has such tensors.

    Returns:
        The names of the tensors that were set.

    Raises:
        UserError: If both have tensors and these differ in names or shapes.
    """
    file, kind = folder / files.EXTRA, type(module).__name__
    tensors = {name: tensor for name, tensor in own_tensors(module).items() if name not in filled}
    stored = load_file(file) if file.is_file() else {}
    stored = {name: tensor for name, tensor in stored.items() if name not in filled}
    if not is_last:  # an override may fill the rest
        tensors = {name: tensor for name, tensor in tensors.items() if name in stored}
        stored = {name: tensor for name, tensor in stored.items() if name in tensors}
    if not tensors or not stored:
        if tensors:
            say_once(f"{', '.join(tensors)} of {kind} start from scratch: the adapter in {folder} lacks them.")
        if stored:
            say_once(f"{file} has {', '.join(stored)}, which {kind} does not have: they are ignored.")
        return set()
    here, there = ({name: tuple(each.shape) for name, each in both.items()} for both in (tensors, stored))
    if here != there:
        raise UserError(
            f"{file} has {_format_shapes(there)}, but {kind} has {_format_shapes(here)} outside its model: use the "
            "class that saved it, or delete the file to start these from scratch.",
            "adapter.extra",
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])
    return {*tensors}


def _format_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))


def add_named_adapter(
    model: peft.PeftModel, name: str, folder: Path, identity: Mapping[str, Any], fast: bool = True
) -> None:
    """Add a folder's adapter to those that a model has; ``model.set_adapter(name)`` then switches to it.

    ``identity`` is the model's.
    """
    # the shape of the adapter may differ from that of the model's first adapter
    check_identity(read_identity(folder), {**identity, "adapter": None}, f"The adapter folder {folder}")
    config = read_lora_config(folder, model.config)
    inject(model, config, str(folder), name)
    fill_adapter(model, folder, name)
    fuse_layers(model, fast)


def check_trainable(module: nn.Module, model: nn.Module) -> None:
    """Reject a module that trains nothing, trains more than its adapter folder holds, or does not train in float32."""
    if any(isinstance(layer, BaseTunerLayer) and layer.merged for layer in model.modules()):
        raise UserError(
            "The adapter is merged into the frozen base, for example by merge_adapter(): nothing would train, and the "
            "base has changed. Create the module again, and merge its saved adapter with `qlora-lightning merge`.",
            "adapter.merged",
        )
    trainable = trainable_tensors(module)
    if not trainable or not isinstance(model, peft.PeftModel):
        raise UserError(
            "No adapter trains: it is frozen, switched off, or was removed, for example by merge_and_unload(). Create "
            "the module again, or let the adapter's tensors require gradients.",
            "adapter.missing",
        )
    saved = {id(tensor) for tensor in _tensors_by_key(model, model.active_adapter).values()}
    if left_out := [name for name, tensor in trainable_tensors(model).items() if id(tensor) not in saved]:
        raise UserError(
            f"{len(left_out)} tensors of the base train, such as {left_out[0]}, but PEFT leaves them out of the "
            "adapter folder: freeze them, or name their modules in modules_to_save. If they are your own head, create "
            "it outside the model, for example in `__init__`.",
            "adapter.left_out",
        )
    check_dtypes(trainable)


def check_dtypes(trainable: Mapping[str, Tensor]) -> None:
    """Reject tensors that train in a dtype other than float32, because small updates would be lost."""
    for name, tensor in trainable.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise UserError(f"{name} would train in {tensor.dtype}. {KEEPS_DTYPES}", "adapter.dtype")


def _tensors_by_key(model: peft.PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return an adapter's tensors by their keys in a file, which are PEFT's keys without the adapter's name."""
    # the explicit state dict keeps PEFT from walking the quantized base; the flag keeps it from asking the hub
    tensors: dict[str, Tensor] = peft.get_peft_model_state_dict(
        model, adapter_tensors(model, adapter), adapter_name=adapter, save_embedding_layers=False
    )
    config = model.get_base_model().config
    return {key_in_folder(key, config): tensor for key, tensor in tensors.items()}
