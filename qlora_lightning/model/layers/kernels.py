"""Triton kernels for 4-bit weights, RMSNorm, SwiGLU, rotary embedding and cross-entropy, one GPU launch each.

Each kernel computes the same result as the function of its name in lora.py, elementwise.py or step/loss.py, which uses
torch's operations. The kernel computes in float32 and rounds once. It is compiled once per width, for any number of
tokens.
"""
# mypy: allow-untyped-decorators

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # columns per program when a program handles only part of a row
_LOGITS_BLOCK = 4096  # logits of a row at a time

_compiled: dict[Any, Any] = {}


def _launch(kernel: Any, programs: int, tensors: Sequence[Any], constants: tuple[Any, ...], **options: Any) -> None:
    """Launch a kernel that takes tensors, then constants.

    Triton's own launch looks up the compiled kernel by everything it may specialize on, which takes the host twice as
    long.
    """
    kinds = [tensor if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors]
    key = (kernel, tensors[0].device, constants, *kinds)
    if (compiled := _compiled.get(key)) is not None:
        compiled[(programs, 1, 1)](*tensors, *constants)
        return
    # multiply and add in one instruction; set here because Triton 3.10 changes the default
    options = {"enable_fp_fusion": True, **options}
    _compiled[key] = kernel[(programs,)](*tensors, *constants, **options)  # its interpreter returns None


def _warps(block: int) -> int:
    """Return the number of warps for a program that handles a full row, at 16 numbers per thread."""
    return min(16, max(1, block // 512))


# ---- 4-bit weights (Dettmers et al. 2023, QLoRA) ---------------------------------------------------------------------


def dequantize(packed: Tensor, quant_state: Any) -> Tensor:
    """Compute the same as ``lora.dequantize``."""
    weight = torch.empty(quant_state.shape, dtype=quant_state.dtype, device=packed.device)
    packed = packed if packed.dtype == torch.uint8 else packed.view(torch.uint8)  # see bnb_4bit_quant_storage
    scales, nested_blocksize, size = (None, None, None), 1, packed.numel()
    if quant_state.nested:
        nested = quant_state.state2
        scales, nested_blocksize = (nested.code, nested.absmax, quant_state.offset), nested.blocksize
    tensors = packed, quant_state.code, quant_state.absmax, *scales, weight
    constants = size, quant_state.blocksize, nested_blocksize, _BLOCK
    # bitsandbytes rounds scales before it adds the offset
    _launch(_dequantize, -(-size // _BLOCK), tensors, constants, enable_fp_fusion=False)
    return weight


@triton.jit
def _dequantize(
    packed: tl.tensor,
    code: tl.tensor,
    absmax: tl.tensor,
    nested_code: tl.tensor,
    nested_absmax: tl.tensor,
    offset: tl.tensor,
    weight: tl.tensor,
    SIZE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Unpack bytes that hold two weights, the first in the upper half; a nested scale is an index into its code."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = start + tl.arange(0, BLOCK)
    inside, block = index < SIZE, index * 2 // BLOCKSIZE
    byte, scale = tl.load(packed + index, mask=inside, other=0), tl.load(absmax + block, mask=inside, other=0)
    if nested_code is not None:
        nested_scale = tl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=inside, other=0.0)
        scale = tl.load(nested_code + scale) * nested_scale + tl.load(offset)
    first, second = tl.load(code + (byte >> 4)) * scale, tl.load(code + (byte & 15)) * scale
    index = 2 * start + tl.arange(0, 2 * BLOCK)
    tl.store(weight + index, tl.interleave(first, second), mask=index < 2 * SIZE)


# ---- RMSNorm --------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute the same as ``elementwise.rms_norm``."""
    x = x.contiguous()
    rows, width = x.shape
    normed, inverse_rms = torch.empty_like(x), torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    together = _rows_together(rows, block)
    tensors, constants = (x, weight, normed, inverse_rms), (eps, width, block, together)
    _launch(_rms_norm, rows // together, tensors, constants, num_warps=_warps(block * together))
    return normed, inverse_rms


def _rows_together(rows: int, block: int) -> int:
    """Return the number of rows per program, equal for all programs: up to 32 for rows as short as a head's."""
    return math.gcd(rows, min(32, 4096 // block)) if block <= 256 else 1


@triton.jit
def _rms_norm(
    x: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    inverse_rms: tl.tensor,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    row, columns = _rows_of_program(ROWS), tl.arange(0, BLOCK)[None, :]
    index, inside = row * WIDTH + columns, columns < WIDTH
    x_rows = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x_rows * x_rows, 1, keep_dims=True) / WIDTH + EPS)
    rounded = (x_rows * inverse).to(x.dtype.element_ty).to(tl.float32)  # before the product, as in transformers
    tl.store(normed + index, rounded * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32), mask=inside)
    tl.store(inverse_rms + row, inverse)


@triton.jit
def _rows_of_program(ROWS: tl.constexpr) -> Any:
    return tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, grad_residual: Tensor | None = None
) -> Tensor:
    """Compute the same as ``elementwise.rms_norm_backward``."""
    grad, x = grad.contiguous(), x.contiguous()
    grad_residual = None if grad_residual is None else grad_residual.contiguous()
    grad_x, (rows, width) = torch.empty_like(x), x.shape
    tensors, block = (grad, x, weight, inverse_rms, grad_residual, grad_x), triton.next_power_of_2(width)
    together = _rows_together(rows, block)
    options = {"num_warps": _warps(block * together)}
    _launch(_rms_norm_backward, rows // together, tensors, (width, block, together), **options)
    return grad_x


@triton.jit
def _rms_norm_backward(
    grad: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    inverse_rms: tl.tensor,
    grad_residual: tl.tensor,
    grad_x: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    row, columns = _rows_of_program(ROWS), tl.arange(0, BLOCK)[None, :]
    index, inside = row * WIDTH + columns, columns < WIDTH
    inverse = tl.load(inverse_rms + row)
    x_hat = tl.load(x + index, mask=inside, other=0.0).to(tl.float32) * inverse
    weighted_grad = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
    weighted_grad *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    result = (weighted_grad - x_hat * (tl.sum(x_hat * weighted_grad, 1, keep_dims=True) / WIDTH)) * inverse
    if grad_residual is not None:
        result += tl.load(grad_residual + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_x + index, result, mask=inside)


# ---- SwiGLU ---------------------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute the same as ``elementwise.swiglu``."""
    hidden, (rows, width) = torch.empty_like(gate), gate.shape
    _launch(_swiglu, rows * -(-width // _BLOCK), (gate, up, hidden), (width, _BLOCK))
    return hidden


@triton.jit
def _swiglu(gate: tl.tensor, up: tl.tensor, hidden: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    index, inside = _index_in_row(WIDTH, BLOCK)
    x = tl.load(gate + index, mask=inside).to(tl.float32)
    tl.store(hidden + index, x * tl.sigmoid(x) * tl.load(up + index, mask=inside).to(tl.float32), mask=inside)


@triton.jit
def _index_in_row(WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> Any:
    """Return the elements that a program handles in its block of a row, and which of them are inside the row."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64) * WIDTH + columns, columns < WIDTH


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as ``elementwise.swiglu_backward``, in place, because these states are the largest of a step."""
    torch.autograd.graph.increment_version((gate, up))  # a second backward is an error
    rows, width = gate.shape
    _launch(_swiglu_backward, rows * -(-width // _BLOCK), (gate, up, grad), (width, _BLOCK))
    return grad, gate, up


@triton.jit
def _swiglu_backward(gate: tl.tensor, up: tl.tensor, grad: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Overwrite ``grad`` with the hidden states, and gate and up with their gradients."""
    index, inside = _index_in_row(WIDTH, BLOCK)
    x, other = tl.load(gate + index, mask=inside).to(tl.float32), tl.load(up + index, mask=inside).to(tl.float32)
    grad_hidden, sigmoid = tl.load(grad + index, mask=inside).to(tl.float32), tl.sigmoid(x)
    tl.store(grad + index, x * sigmoid * other, mask=inside)
    tl.store(up + index, x * sigmoid * grad_hidden, mask=inside)
    tl.store(gate + index, grad_hidden * other * sigmoid * (1.0 + x * (1.0 - sigmoid)), mask=inside)


# ---- rotary position embedding --------------------------------------------------------------------------------------


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """Compute the same as ``elementwise.rotate``."""
    query, key, cos, sin = query.contiguous(), key.contiguous(), cos.contiguous(), sin.contiguous()
    rotated_query, rotated_key = torch.empty_like(query), torch.empty_like(key)
    (tokens, query_heads, head_dim), key_heads = query.shape, key.shape[1]
    sizes = query_heads, key_heads, head_dim // 2
    tensors = query, key, cos, sin, rotated_query, rotated_key
    constants = (*sizes, *map(triton.next_power_of_2, sizes), sign)
    _launch(_rotate, tokens, tensors, constants, num_warps=4 if query_heads <= 32 else 8)
    return rotated_query, rotated_key


@triton.jit
def _rotate(
    query: tl.tensor,
    key: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    rotated_query: tl.tensor,
    rotated_key: tl.tensor,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGN: tl.constexpr,
) -> None:
    token, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)[None, :]
    cosine = tl.load(cos + token * 2 * HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    sine = SIGN * tl.load(sin + token * 2 * HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    _rotate_heads(query, rotated_query, token, cosine, sine, QUERY_HEADS, HALF, QUERY_BLOCK, BLOCK)
    _rotate_heads(key, rotated_key, token, cosine, sine, KEY_HEADS, HALF, KEY_BLOCK, BLOCK)


@triton.jit
def _rotate_heads(
    states: tl.tensor,
    rotated: tl.tensor,
    token: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    heads, columns = tl.arange(0, HEAD_BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    index, inside = (token * HEADS + heads) * 2 * HALF + columns, (heads < HEADS) & (columns < HALF)
    first = tl.load(states + index, mask=inside).to(tl.float32)
    second = tl.load(states + index + HALF, mask=inside).to(tl.float32)
    tl.store(rotated + index, first * cosine - second * sine, mask=inside)
    tl.store(rotated + index + HALF, second * cosine + first * sine, mask=inside)


# ---- cross-entropy --------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Compute the same as ``loss.cross_entropy``."""
    rows, vocabulary = logits.shape
    nll, correct = logits.new_empty(rows, dtype=torch.float32), torch.empty_like(targets, dtype=torch.bool)
    constants = vocabulary, with_gradient, _LOGITS_BLOCK
    _launch(_cross_entropy, rows, (logits, targets, nll, correct), constants, num_warps=8)
    return nll, correct


@triton.jit
def _cross_entropy(
    logits: tl.tensor,
    targets: tl.tensor,
    nll: tl.tensor,
    correct: tl.tensor,
    VOCABULARY: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits += row * VOCABULARY
    target = tl.load(targets + row)
    is_token = (target >= 0) & (target < VOCABULARY)  # else the loss is NaN
    target_logit = tl.load(logits + target, mask=is_token, other=float("nan")).to(tl.float32)
    maximum, total, prediction = float("-inf"), 0.0, 0  # over the logits so far; total sums exp(logit - maximum)
    for start in range(0, VOCABULARY, BLOCK):
        block = tl.load(logits + start + columns, mask=start + columns < VOCABULARY, other=float("-inf")).to(tl.float32)
        block_maximum, block_prediction = tl.max(block, 0, return_indices=True)
        prediction = tl.where(block_maximum > maximum, start + block_prediction, prediction)
        new_maximum = tl.maximum(maximum, block_maximum)
        finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp(maximum - finite) + tl.sum(tl.exp(block - finite))
        maximum = new_maximum
    tl.store(nll + row, tl.log(total) + (maximum - target_logit))
    tl.store(correct + row, prediction == target)
    if WITH_GRADIENT:
        for start in range(0, VOCABULARY, BLOCK):
            index = start + columns
            block = tl.load(logits + index, mask=index < VOCABULARY, other=float("-inf")).to(tl.float32)
            probability = tl.exp(block - maximum) / total
            tl.store(logits + index, probability - tl.where(index == target, 1.0, 0.0), mask=index < VOCABULARY)
