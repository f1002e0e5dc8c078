"""An ordinary transformers folder, checked before anything is loaded from it."""

import json
from pathlib import Path
from typing import Any

from qlora_lightning.base.safetensors_header import read_spans
from qlora_lightning.errors import UserError
from qlora_lightning.json_file import read_json_object

# What a config can ask for, and our attention and transformers' LLaMA would pass over in silence.
_UNSUPPORTED = {
    "sliding_window": "a sliding attention window",
    "attention_chunk_size": "chunked attention",
    "attn_logit_softcapping": "soft caps on attention scores",
    "final_logit_softcapping": "soft caps on logits",
    "attention_sinks": "attention sinks",
    "attention_sink_size": "attention sinks",
    "num_attention_sinks": "attention sinks",
}


def check_model_folder(folder: Path, name: str, *, weights: bool = True) -> None:
    """Check that ``folder`` holds a LLaMA that this package trains as it is.

    Args:
        folder: with ``config.json`` and, where ``weights``, safetensors files.
        name: what the user wrote, for messages.
        weights: False looks at the config alone.

    Raises:
        UserError: something is missing, damaged, or of another kind.
    """
    config = read_config(folder, name)
    model_type = config.get("model_type")
    if model_type != "llama":
        raise UserError(
            f"Base {name}: expected model_type llama in {folder / 'config.json'}, found {model_type!r}. "
            "Choose a LLaMA-family base (Llama 2, 3, SmolLM, TinyLlama, Yi, …)."
        )
    _check_features(config, name)
    if weights:
        _check_weights(folder, name)


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Return the folder's ``config.json``.

    Raises:
        UserError: it is missing or not a JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = " It is an adapter folder: give it as model.adapter, and its base as model.base."
        raise UserError(f"Base {name}: expected a transformers folder, found no config.json in {folder}.{hint}")
    try:
        return read_json_object(file, "Download or save the base again.")
    except UserError as error:
        raise UserError(f"Base {name}: {error}") from error


def weight_files(folder: Path, name: str) -> list[Path]:
    """Return the safetensors files that transformers loads from ``folder``, all of which exist.

    Raises:
        UserError: there are none, or the index names some that are missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(_no_weights(folder, name))
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"Base {name}: {index} is not an index of shards ({error!r}). Download or save the base again."
        ) from error
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing or not shards:
        found = f"{len(missing)} of {len(shards)} shards are missing" + (f" ({missing[0]}, …)" if missing else "")
        raise UserError(f"Base {name}: {found}, which {index} names. Finish the download, or copy the missing files.")
    return [folder / shard for shard in shards]


def _check_features(config: dict[str, Any], name: str) -> None:
    for key, meaning in _UNSUPPORTED.items():
        off = key == "sliding_window" and config.get("use_sliding_window") is False
        if config.get(key) and not off:
            raise UserError(
                f"Base {name}: its config.json sets {key}: {config[key]} ({meaning}), which qlora_lightning does not "
                "compute and will not ignore. Choose a base without it."
            )
    layer_types = set(config.get("layer_types") or ()) - {"full_attention"}
    if layer_types:
        raise UserError(
            f"Base {name}: its config.json has layer_types {', '.join(sorted(layer_types))}; expected full_attention "
            "alone. Choose a base without them."
        )


def _check_weights(folder: Path, name: str) -> None:
    for file in weight_files(folder, name):
        sinks = [span.name for span in read_spans(file) if span.name.endswith(".sinks")]
        if sinks:
            raise UserError(
                f"Base {name}: {file.name} holds attention sinks ({sinks[0]}, …), which qlora_lightning does not "
                "compute and will not ignore. Choose a base without them."
            )


def _no_weights(folder: Path, name: str) -> str:
    expected = f"Base {name}: expected model.safetensors or model.safetensors.index.json in {folder}"
    pickles = sorted(file.name for file in folder.glob("*.bin") if file.name.startswith("pytorch_model"))
    if pickles:
        return (
            f"{expected}, found only {pickles[0]}, a pickle, which can run code when it is opened and is refused. "
            "Convert it once, where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new)."
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    found = ", ".join(others) or "no *.safetensors file"
    return f"{expected}, found {found}. Give the folder of a whole model."
