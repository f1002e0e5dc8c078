"""The architecture as a picture in the terminal, with what is adapted."""

from collections.abc import Iterable, Sequence
from typing import Any

from peft.tuners.lora import LoraLayer
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qlora_lightning.model.adapters.lora import ADAPTER

_ADAPTED = "green"
_DOWN = Text("     │")
_BLOCKS = (
    ("input_layernorm", ("input_layernorm",)),
    ("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")),
    ("post_attention_layernorm", ("post_attention_layernorm",)),
    ("SwiGLU MLP", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
)


def draw_model(model: Any) -> Panel:
    """Draw embedding, decoder layers, norm and head; adapted linears in green, with the shapes of A and B."""
    inner = model.get_base_model()
    config, layers = inner.config, inner.model.layers
    title = f"{len(layers)} × decoder layer, {config.num_attention_heads} heads over {config.num_key_value_heads}"
    tied = Text("  tied to embed_tokens" if config.tie_word_embeddings else "", "dim")
    return Panel(
        Group(
            Text.assemble(("embed_tokens  ", "bold"), _describe(inner.model.embed_tokens)),
            _DOWN,
            Panel(_draw_layer(layers, config), title=title, title_align="left", expand=False),
            _DOWN,
            Text.assemble(("RMSNorm       ", "bold"), _describe(inner.model.norm)),
            Text.assemble(("lm_head       ", "bold"), _describe(inner.lm_head), tied),
        ),
        title=f"LLaMA, {config.hidden_size:,} wide",
        title_align="left",
        expand=False,
    )


def _draw_layer(layers: Any, config: Any) -> Table:
    drawing = Table.grid(padding=(0, 2, 0, 0))
    for block, names in _BLOCKS:
        if len(names) == 1:
            drawing.add_row(Text("RMSNorm", "bold"), Text(f"{config.hidden_size:,}"), "")
            continue
        attends = block == "attention"
        note = f"head width {config.head_dim}, rotary θ {_theta(config):,.0f}" if attends else "down(silu(gate) · up)"
        drawing.add_row(Text(block, "bold"), "", Text(note, "dim"))
        for name in names:
            linears = [layer.get_submodule(name) for layer in layers]
            drawing.add_row(Text(f"  {name.partition('.')[2]}"), *_draw_linear(linears))
        drawing.add_row(Text("  + residual", "dim"), "", "")
    return drawing


def _theta(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta", getattr(config, "rope_theta", None) or 10_000.0))


def _draw_linear(linears: Sequence[Any]) -> tuple[Text, Text]:
    """Return the shape of a linear, and the adapter on it with the layers that have it."""
    inputs, outputs = linears[0].in_features, linears[0].out_features
    shape = Text(f"{inputs:,} → {outputs:,}")
    ranks = {number: linear.r[ADAPTER] for number, linear in enumerate(linears) if isinstance(linear, LoraLayer)}
    if not ranks:
        return shape, Text("frozen", "dim")
    numbers = ", ".join(str(rank) for rank in sorted(set(ranks.values())))
    where = "" if len(ranks) == len(linears) else f", layers {name_ranges(ranks)}"
    return shape, Text(f"A {numbers} × {inputs:,}, B {outputs:,} × {numbers}{where}", _ADAPTED)


def name_ranges(numbers: Iterable[int]) -> str:
    """Write ascending numbers shortly: ``0, 4–7``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in ranges)


def _describe(module: Any) -> Text:
    adapted = isinstance(module, LoraLayer)
    base = module.get_base_layer() if adapted else module
    trains = any(parameter.requires_grad for parameter in module.parameters())
    words = " × ".join(f"{size:,}" for size in base.weight.shape) if hasattr(base, "weight") else ""
    if adapted:
        return Text(f"{words}  adapter of rank {module.r[ADAPTER]}", _ADAPTED)
    return Text(f"{words}  trains", _ADAPTED) if trains else Text(words)
