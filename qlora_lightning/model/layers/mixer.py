"""Layers with a state in packed batches: convolutions and scans, which run through a row from its first token on.

Such a mixer is found by structure: it is the module of a decoder layer that has a convolution over time inside, unlike
attention, MLP, experts and norms. Everything else sees the packed stream. The mixer alone gets samples of similar
lengths side by side, padded on the right: it is causal, so what is behind a sample changes nothing in it. If kernels
that transformers looks for are installed on a GPU, samples stay one after the other, and the kernels get their bounds.
Outside of :func:`~qlora_lightning.model.layers.attention.packed_pass`, as in ``generate``, it is transformers' own.
"""
# mypy: allow-untyped-calls

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_causal_conv1d_available, is_flash_linear_attention_available

from qlora_lightning.model.layers.attention import Expand, current_pass
from qlora_lightning.model.layers.lora import Fused
from qlora_lightning.model.model_types import LINEARS, decoder_layers, linear_sizes
from qlora_lightning.model.step.layout import SequenceBounds

# What mixers of a type hand on to kernels that keep samples apart: of flash-linear-attention, and of causal-conv1d. All
# others drop them, or need kernels that read weights past their adapters (mamba-ssm).
_DELTA_RULE = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid")
_CONVOLUTION = ("lfm2", "lfm2_moe")


def pack_mixers(causal_lm: Any) -> None:
    """Let the mixers of a model take packed batches. They keep their names and parts."""
    for layer in decoder_layers(causal_lm):
        for name, module in layer.named_children():
            if not isinstance(module, PackedMixer) and any(isinstance(each, nn.Conv1d) for each in module.modules()):
                mixer = PackedMixer.from_layer(module)
                mixer.model_type = causal_lm.config.model_type
                layer.set_submodule(name, mixer)


def changes_by_padding(causal_lm: Any) -> bool:
    """Whether tokens of padding before a prompt, whose states are zeros, reach a mixer's state: through a bias."""
    mixers = (module for module in causal_lm.modules() if isinstance(module, PackedMixer))
    linears = (module for mixer in mixers for module in mixer.modules() if isinstance(module, LINEARS))
    width = causal_lm.config.hidden_size  # of what comes in; a bias behind the convolution meets a state of zeros
    return any(linear.bias is not None and linear_sizes(linear)[0] == width for linear in linears)


def has_kernels(device: torch.device, delta_rule: bool) -> bool:
    """Whether kernels for the convolution, and if asked for the delta rule, are installed and run on a device."""
    return (
        device.type == "cuda"
        and is_causal_conv1d_available()
        and (not delta_rule or is_flash_linear_attention_available())
    )


class PackedMixer(Fused):
    """A mixer of transformers that computes each sample of a packed batch by itself.

    This is in ``__call__`` and not in ``forward``, so that hooks, or a ``forward`` that accelerate or others have set
    on the module, see rows too.
    """

    fallback_reason = None
    model_type: str

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(1, n_tokens, width)`` to the same; masks, positions and caches are those of whole rows: none."""
        batch = current_pass.get()
        if batch is None:
            return cast(Tensor, super().__call__(hidden_states, *args, **kwargs))
        states, sequences = hidden_states.squeeze(0), batch.sequences
        bounds = self._kernel_bounds(hidden_states, sequences) if batch.fused else None
        if bounds is not None:
            expanded = sequences.expanded
            states = Expand.apply(states, expanded) if expanded.has_shared else states
            output = super().__call__(states.unsqueeze(0), **bounds).squeeze(0)
            output = output.index_select(0, expanded.first_expanded) if expanded.has_shared else output
            return cast(Tensor, output.unsqueeze(0))
        groups = sequences.groups
        states = states if groups.is_stream else Expand.apply(states, groups.expanded)
        parts = states.split([samples * tokens for samples, tokens in groups.shapes])
        inputs = [part.view(*shape, -1) for part, shape in zip(parts, groups.shapes, strict=True)]
        output = torch.cat([super(PackedMixer, self).__call__(each).flatten(0, 1) for each in inputs])
        return (output if groups.is_stream else output.index_select(0, groups.expanded.first_expanded)).unsqueeze(0)

    def _kernel_bounds(self, hidden_states: Tensor, sequences: SequenceBounds) -> dict[str, Tensor] | None:
        """Return what tells the kernels of this mixer where samples are; ``None`` if they are not installed."""
        is_delta_rule = self.model_type in _DELTA_RULE
        if not is_delta_rule and self.model_type not in _CONVOLUTION:
            return None
        if not has_kernels(hidden_states.device, is_delta_rule):
            return None
        bounds = {"seq_idx": sequences.sample_index}
        return bounds | {"cu_seq_lens_q": sequences.cu_seqlens} if is_delta_rule else bounds
