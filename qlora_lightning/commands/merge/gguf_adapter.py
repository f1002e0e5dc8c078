"""An adapter alone as a GGUF file, which llama.cpp puts on a base: ``llama-cli -m BASE.gguf --lora FILE``."""

import math
from pathlib import Path

import gguf
import numpy as np
import torch
from peft.tuners.lora import LoraLayer

from qlora_lightning.commands.merge.gguf_tensors import map_name, permute_rows
from qlora_lightning.model.adapters.lora import ADAPTER
from qlora_lightning.model.weights.merging import MergePlan, adapted_layers, changed_modules
from qlora_lightning.support.errors import UserError


def write_adapter(file: Path, plan: MergePlan, title: str) -> None:
    """Write A and B of every module in fp32.

    llama.cpp scales an update by alpha / rank with one alpha for all: where PEFT scales otherwise (rsLoRA, a pattern of
    ranks or alphas), B takes the difference.

    Args:
        file: Where to.
        plan: The adapter.
        title: Its name.

    Raises:
        UserError: The adapter is more than plain LoRA on linears, for which the format has no place.
    """
    layers = adapted_layers(plan)
    _check(plan, layers)
    config = plan.config
    alpha = float(plan.model.peft_config[ADAPTER].lora_alpha)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(title)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, layer in layers.items():
        a, b = (each[ADAPTER].weight.detach().float() for each in (layer.lora_A, layer.lora_B))
        factor = layer.scaling[ADAPTER] / (alpha / len(a))
        factor = 1.0 if math.isclose(factor, 1.0) else factor
        rows = permute_rows(f"{name}.weight", (b * factor).numpy(), config)
        place = map_name(f"{name}.weight", config.num_hidden_layers)
        writer.add_tensor(f"{place}.lora_a", a.numpy())  # (rank, in)
        writer.add_tensor(f"{place}.lora_b", np.ascontiguousarray(rows))  # (out, rank)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(plan: MergePlan, layers: dict[str, LoraLayer]) -> None:
    others = [name for name in changed_modules(plan.model.get_base_model()) if not _is_plain(layers.get(name))]
    if others:
        raise UserError(
            f"--adapter-gguf: {others[0]} carries more than plain LoRA on a linear, for which the format has no place. "
            "Merge it: --out DIR --gguf f16."
        )


def _is_plain(layer: LoraLayer | None) -> bool:
    return layer is not None and not layer.lora_variant and type(layer.get_base_layer()) is torch.nn.Linear
