"""Writes the adapter folder: what plain PEFT, transformers and the tools around them load."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
from torch import Tensor

from qlora_lightning.format_version import FORMAT_VERSION
from qlora_lightning.model.adapters.folder_swap import refill_folder
from qlora_lightning.model.adapters.tensors import save_tensors
from qlora_lightning.safe_file import set_usual_mode

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
        identity: What :func:`qlora_lightning.adapter.identity.read_identity` gives of it.
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
