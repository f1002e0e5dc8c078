"""Stateful layers in packed batches: convolutions and scans, which run through a row from its first token.

Such a mixer is found by its structure. It is the module of a decoder layer that contains a convolution over time,
unlike attention, MLP, experts and norms. Everything else sees the packed stream. Only the mixer gets samples of similar
lengths as a batch, padded on the right. A mixer is causal, so padding after a sample does not change the sample. If the
kernels that transformers looks for are installed on a GPU, samples stay in the stream and the kernels get their bounds.
Outside :func:`~qlora_lightning.model.layers.attention.packed_pass`, such as in ``generate``, transformers' own mixer
runs.
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

# Types whose mixers pass the bounds of samples on to kernels that keep samples apart: those of flash-linear-attention,
# and those of causal-conv1d. All other types drop the bounds, or need kernels that read weights without their adapters
# (mamba-ssm).
_DELTA_RULE = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid")
_CONVOLUTION = ("lfm2", "lfm2_moe")


def pack_mixers(causal_lm: Any) -> None:
    """Let a model's mixers accept packed batches; they keep their names and submodules."""
    for layer in decoder_layers(causal_lm):
        for name, module in layer.named_children():
            if not isinstance(module, PackedMixer) and any(isinstance(each, nn.Conv1d) for each in module.modules()):
                mixer = PackedMixer.from_layer(module)
                mixer.model_type = causal_lm.config.model_type
                layer.set_submodule(name, mixer)


def changes_by_padding(causal_lm: Any) -> bool:
    """Whether padding in front of a prompt changes a mixer's state: its states are zeros, but a bias alters them."""
    mixers = (module for module in causal_lm.modules() if isinstance(module, PackedMixer))
    linears = (module for mixer in mixers for module in mixer.modules() if isinstance(module, LINEARS))
    width = causal_lm.config.hidden_size  # of the inputs; a bias after the convolution meets a state of zeros
    return any(linear.bias is not None and linear_sizes(linear)[0] == width for linear in linears)


def has_kernels(device: torch.device, delta_rule: bool) -> bool:
    """Whether a device has kernels for the convolution and, if ``delta_rule`` is set, for the delta rule."""
    return (
        device.type == "cuda"
        and is_causal_conv1d_available()
        and (not delta_rule or is_flash_linear_attention_available())
    )


class PackedMixer(Fused):
    """A transformers mixer that computes each sample of a packed batch separately.

    It overrides ``__call__`` and not ``forward``, so that hooks see rows too. The same goes for a ``forward`` that
    accelerate or another library has set on the module.
    """

    fallback_reason = None
    model_type: str

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``(1, n_tokens, width)`` to the same shape; complete rows need no mask, positions or cache."""
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
        """Return the bounds of samples as this mixer's kernels expect them; ``None`` if these are not installed."""
        is_delta_rule = self.model_type in _DELTA_RULE
        if not is_delta_rule and self.model_type not in _CONVOLUTION:
            return None
        if not has_kernels(hidden_states.device, is_delta_rule):
            return None
        bounds = {"seq_idx": sequences.sample_index}
        return bounds | {"cu_seq_lens_q": sequences.cu_seqlens} if is_delta_rule else bounds
