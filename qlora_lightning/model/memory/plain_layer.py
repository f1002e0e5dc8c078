"""What a decoder layer that is not fused keeps for backward: counted while it runs on the meta device."""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from transformers import AttentionInterface

from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.layers import attention
from qlora_lightning.model.step.layout import whole_samples
from qlora_lightning.support.console import quiet_loggers
from qlora_lightning.support.versions import attend_ragged

_TOKENS = 256  # of the sample that is run


def count_saved(causal_lm: Any, layer: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Return the bytes a token that a layer keeps, and those more for each token of its row: of attention scores."""
    once, twice = (_run(causal_lm.config, layer, tokens, dtype) / tokens for tokens in (_TOKENS, 2 * _TOKENS))
    return 2 * once - twice, (twice - once) / _TOKENS


def _run(config: Any, layer: Any, tokens: int, dtype: torch.dtype) -> int:
    # as autocast has the adapters, whose copies are a part of their own
    adapters = {name: each.detach().to(dtype).requires_grad_() for name, each in trainable_tensors(layer).items()}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(head_dim * (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0))
    angles = torch.empty(1, tokens, rotated, dtype=dtype, device="meta")
    hidden = torch.empty(1, tokens, config.hidden_size, dtype=dtype, device="meta", requires_grad=True) + 0
    samples, saved = whole_samples([tokens]), {hidden.untyped_storage()}

    def keep(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage())  # once, whatever views of it are kept
        return tensor

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if options.get("softcap") is not None:  # no kernel has it
            return attention.flat_attention(module, query, key, value, mask, samples=samples, **options)
        query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
        return attend_ragged(query, key, value, samples.cu_seqlens.to("meta"), tokens, scale=None)[None], None

    for name in (attention.FLAT_ATTENTION, attention.PLAIN_FLAT_ATTENTION):
        AttentionInterface.register(name, attend)
    try:  # int8 layers warn in each run that they round their input to float16
        with quiet_loggers(logging.ERROR, "bitsandbytes.autograd._functions"), saved_tensors_hooks(keep, lambda x: x):
            arguments = {"attention_mask": None, "position_embeddings": (angles, angles), "use_cache": False}
            functional_call(layer, adapters, (hidden,), arguments)
    finally:
        attention.register_flat_attention()
    weights = {each.untyped_storage() for each in (*layer.parameters(), *layer.buffers(), *adapters.values(), angles)}
    return sum(each.nbytes() for each in saved - weights)
