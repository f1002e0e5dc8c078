"""The parts of a training step, and the rules by which an operator, or an autograd function, belongs to one."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from peft.tuners.lora import LoraLayer
from torch import nn

from qlora_lightning.model.kernels.library import PROFILED

BASE = "base products"
DEQUANTIZATION = "dequantization"
ADAPTERS = "adapters"
ATTENTION = "attention"
NORMS = "norms"
ROTARY = "rotary"
ACTIVATION = "SwiGLU"
HEAD = "head and loss"
OPTIMIZER = "optimizer and clipping"
DATA = "data"
RECOMPUTATION = "recomputation"  # of gradient checkpointing
REST = "Lightning and the rest"
PARTS = (
    *(BASE, DEQUANTIZATION, ADAPTERS, ATTENTION, NORMS, ROTARY, ACTIVATION, HEAD),
    *(OPTIMIZER, DATA, RECOMPUTATION, REST),
)


class Rule(NamedTuple):
    """A part by name.

    Attributes:
        names: Regular expression for the whole name of an operator or autograd function.
        part: What it belongs to.
        whole: Whether all that runs inside belongs to it too; else products, dequantization and the adapters' narrow
            matrices inside are told apart.
    """

    names: str
    part: str
    whole: bool


RULES = (
    # autograd functions of qlora_lightning.model; a backward has the name of its forward
    Rule("NormedLinears", NORMS, False),
    Rule("LoRALinearFunction", ADAPTERS, False),
    Rule("SwiGLUProjection|KeptForSwiGLU", ACTIVATION, False),
    Rule("Rotary", ROTARY, True),
    Rule("SampleAttention|_Attention|_Expand", ATTENTION, True),
    Rule("_FrozenHeadLoss", HEAD, True),
    Rule("_CopyApart", RECOMPUTATION, True),
    Rule(f"{PROFILED}multiply", BASE, True),  # the adapter's wide product with it, and making the weight dense
    # bitsandbytes
    Rule("MatMul4Bit", BASE, False),
    Rule("MatMul8bitLt", BASE, True),
    Rule(".*dequantize.*", DEQUANTIZATION, True),
    # torch
    Rule("(?i).*(scaled_?dot_?product|varlen|flash|efficient_?attention).*", ATTENTION, True),
    Rule("aten::(bmm|baddbmm_?)|Bmm|Baddbmm", ATTENTION, True),
    Rule("aten::(cross_entropy_loss|_?log_softmax.*|nll_loss.*)|LogSoftmax|NllLoss", HEAD, True),
    Rule("aten::silu.*|Silu", ACTIVATION, True),
    Rule("torch::autograd::AccumulateGrad", ADAPTERS, True),
    Rule(r"Optimizer\..*", OPTIMIZER, False),  # its step runs forward and backward inside
)
_PRODUCT = re.compile("aten::(linear|matmul|mm|addmm_?|mv|addmv_?|_int_mm)")
_SCOPE = re.compile("(whole )?part: (.*)")
_RULES = [(re.compile(rule.names), rule) for rule in RULES]


class Widths(NamedTuple):
    """What tells products apart.

    Attributes:
        narrow: Ranks of the adapters, and of neighbours stacked into one matrix.
        hidden: Of the base.
        vocabulary: Rows of the head.
        clashing: Ranks of that kind that are widths of the base too: such products count as the base's.
        tokens: Of the batches at hand, as many as are computed.
    """

    narrow: frozenset[int]
    hidden: int
    vocabulary: int
    clashing: frozenset[int] = frozenset()
    tokens: frozenset[int] = frozenset()


def name_scope(part: str, whole: bool) -> str:
    """Name a range of code as :func:`find_part` knows it."""
    return f"{'whole ' if whole else ''}part: {part}"


def is_scope(name: str) -> bool:
    """Whether :func:`name_scope` made the name."""
    return _SCOPE.fullmatch(name) is not None


def find_part(name: str, shapes: Sequence[Any], around: str, widths: Widths) -> tuple[str, bool] | None:
    """Find the part that an operator belongs to by itself, and whether with all that runs inside.

    Args:
        name: Of the operator, of an autograd function without its ``Backward``, or of a range.
        shapes: Of its inputs.
        around: The part of what calls it.
        widths: Of the model.

    Returns:
        ``None`` where it belongs to what calls it.
    """
    scope = _SCOPE.fullmatch(name)
    if scope:
        return scope[2], scope[1] is not None
    rule = find_rule(name)
    if rule is not None:
        return rule.part, rule.whole
    if around == OPTIMIZER or not name.startswith("aten::"):
        return None
    sizes = {size for shape in shapes for size in shape if isinstance(size, int)}
    if _PRODUCT.fullmatch(name):
        if any(len(shape) > 3 for shape in shapes):
            return ATTENTION, True
        if _has_rank(name, shapes, widths):
            return ADAPTERS, True
        return (HEAD if widths.vocabulary in sizes else BASE), True
    if any(len(shape) == 2 and set(shape) & widths.narrow - widths.tokens - {1} for shape in shapes):
        return ADAPTERS, True  # casts, scales or stacks the adapters' matrices
    return None


def _has_rank(name: str, shapes: Sequence[Any], widths: Widths) -> bool:
    """Whether one of a product's dimensions is a rank, and not just as many tokens."""
    matrices = [shape for shape in shapes if len(shape) > 1]
    if len(matrices) < 2:
        return any(size in widths.narrow for shape in shapes for size in shape)
    left, right = matrices[:2] if name == "aten::linear" else matrices[-2:]
    dimensions = [math.prod(left[:-1]), left[-1], right[0] if name == "aten::linear" else right[-1]]
    narrow = sum(size in widths.narrow for size in dimensions)
    return narrow > (1 if any(size in widths.narrow & widths.tokens for size in dimensions) else 0)


def count_tokens(name: str, shapes: Sequence[Any]) -> int | None:
    """Count the tokens that an operator looks up in an embedding; ``None`` for another operator."""
    return math.prod(shapes[1]) if name == "aten::embedding" else None


def find_rule(name: str) -> Rule | None:
    """Find the rule for a name."""
    return next((rule for pattern, rule in _RULES if pattern.fullmatch(name)), None)


def count_logit_rows(shapes: Sequence[Any], widths: Widths) -> int:
    """Count the tokens whose logits an operator is given, by the shapes of its inputs."""
    wide = [shape[0] for shape in shapes if len(shape) == 2 and shape[1] == widths.vocabulary]
    of_weights = widths.narrow | {widths.hidden}  # the head's, turned, and of an adapter on it
    return max((rows for rows in wide if rows not in of_weights), default=0)


def read_widths(model: nn.Module, hidden: int, vocabulary: int) -> Widths:
    """Read ranks and widths from a PEFT model."""
    wide = {hidden, vocabulary}
    narrow: set[int] = set()
    for parent in model.modules():
        layers = [child for child in parent.children() if isinstance(child, LoraLayer)]
        wide |= {width for layer in layers for width in (layer.in_features, layer.out_features)}
        narrow |= _sums_of_neighbours([rank for layer in layers for rank in layer.r.values()])
    return Widths(frozenset(narrow - wide), hidden, vocabulary, frozenset(narrow & wide))


def _sums_of_neighbours(ranks: Sequence[int]) -> set[int]:
    """Give what up to three come to: the A's of queries, keys and values, or of gate and up, act as one matrix."""
    return {sum(ranks[first:end]) for first in range(len(ranks)) for end in range(first + 1, first + 4)}
