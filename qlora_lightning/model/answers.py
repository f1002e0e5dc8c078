"""Answers to prompts by transformers' ``generate``: batches of similar lengths, 4-bit weights dense meanwhile."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from qlora_lightning.model.layers.lora import dequantize
from qlora_lightning.model.layers.mixer import changes_by_padding
from qlora_lightning.model.load.machine import free_bytes
from qlora_lightning.model.model_types import runs_packed
from qlora_lightning.model.step.forward import evaluation_mode
from qlora_lightning.support.errors import UserError, is_out_of_memory

BATCH_SIZE = 64  # rows that are answered together
TOKEN_BUDGET = 32_768  # keys and values that are kept at a time: of SmolLM2-135M 0.75 GB, of Llama-3.1-8B 4.3 GB
_MAX_PACKED_PROMPTS = 4  # up to this many, bitsandbytes multiplies packed weights on every GPU
_GREEDY: dict[str, Any] = {  # whatever a base's generation_config.json asks for
    **{"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "min_p": None},
    **{"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "max_length": None, "use_cache": True},
    **dict.fromkeys(("min_new_tokens", "suppress_tokens", "bad_words_ids", "stop_strings")),
}


def generate_answers(
    causal_lm: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int = 128,
    batch_size: int = BATCH_SIZE,
    on_batch: Callable[[Sequence[int], Sequence[list[int]]], None] = lambda indices, answers: None,
    **options: Any,
) -> list[list[int]]:
    """Continue each prompt until a stop token, greedily; in float32 an answer is the same whatever it is batched with.

    4-bit weights are dequantized once for all prompts, if there is memory for that; a GPU multiplies a few rows by the
    packed ones. The model's mode is restored.

    Args:
        causal_lm: A causal language model of transformers, adapters in its layers or not.
        prompts: Token ids of each prompt.
        stop_ids: Tokens that end an answer.
        max_new_tokens: Tokens after which an answer is cut.
        batch_size: Rows of a batch at most; fewer if ``TOKEN_BUDGET`` would be passed.
        on_batch: Called for each batch that is done, with the indices of its prompts and their answers.
        options: More arguments of ``generate``, such as ``do_sample`` and ``temperature``.

    Returns:
        The ids of each answer, without the stop token: one shorter than ``max_new_tokens`` has stopped by itself.
    """
    # that of an adapter, which is never sharded: shards may be on the host
    device = next(param for param in causal_lm.parameters() if not isinstance(param, DTensor)).device
    if not runs_packed(causal_lm.config) or changes_by_padding(causal_lm):
        batch_size = 1
    pad_id = min(stop_ids, default=0)
    answers: list[list[int]] = [[] for _ in prompts]
    settings = {**_GREEDY, "max_new_tokens": max_new_tokens, "pad_token_id": pad_id, "synced_gpus": False, **options}
    settings["eos_token_id"] = list(stop_ids) or None
    is_packed = len(prompts) <= _MAX_PACKED_PROMPTS and device.type == "cuda"
    batches = _batches([len(prompt) for prompt in prompts], max_new_tokens, batch_size)
    dense = contextlib.nullcontext() if is_packed else dense_weights(causal_lm)
    with evaluation_mode(causal_lm), dense, _prepared_head(causal_lm):
        for rows in batches:
            batch_answers = _answer_batch(causal_lm, [prompts[row] for row in rows], device, settings)
            for row, answer in zip(rows, batch_answers, strict=True):
                answers[row] = list(itertools.takewhile(lambda token: token not in stop_ids, answer))
            on_batch(rows, [answers[row] for row in rows])
    return answers


def _answer_batch(
    causal_lm: Any, prompts: Sequence[Sequence[int]], device: torch.device, settings: Mapping[str, Any]
) -> list[list[int]]:
    """Continue prompts, padded on the left; if memory runs out, half of them at a time."""
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), int(settings["pad_token_id"]))
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.tensor(prompt), 1
    try:
        output: Tensor = causal_lm.generate(input_ids.to(device), attention_mask=mask.to(device), **settings)
        return cast(list[list[int]], output[:, longest:].tolist())
    except Exception as error:
        if not is_out_of_memory(error) or isinstance(causal_lm.base_model, FSDPModule):  # others wait in passes
            raise
        if len(prompts) == 1:
            raise UserError(
                f"Out of memory on {device} in the answer to one prompt of {longest:,} tokens: shorter prompts take "
                "less, and so do fewer new tokens.",
                "memory.answer",
            ) from error
    half = len(prompts) // 2  # not in the handler: the error's traceback holds the keys and values
    parts = prompts[:half], prompts[half:]
    return [answer for part in parts for answer in _answer_batch(causal_lm, part, device, settings)]


def _batches(lengths: list[int], max_new_tokens: int, batch_size: int) -> Iterator[list[int]]:
    """Batch rows of similar length, the longest first, so that memory runs out at once or never."""
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while rows:
        size = min(batch_size, max(1, TOKEN_BUDGET // (lengths[rows[0]] + max_new_tokens)))
        yield rows[:size]
        rows = rows[size:]


@contextlib.contextmanager
def _prepared_head(causal_lm: Any) -> Iterator[None]:
    """Let the model's own forward call a sharded head so that it is gathered, and copy the input of the head.

    The input is a view, the last position of each prompt, which torch multiplies by a frozen linear row by row: in
    bfloat16 on a CPU in 3.2 seconds for 40 prompts of SmolLM2, a copy of it in 9 ms (measured with torch 2.13).
    """
    linear = causal_lm.get_output_embeddings()
    head = vars(causal_lm).get("sharded_head", linear)
    hook = head.register_forward_pre_hook(lambda _, inputs: tuple(tensor.contiguous() for tensor in inputs))
    try:
        causal_lm.set_output_embeddings(head)
        yield
    finally:
        hook.remove()
        causal_lm.set_output_embeddings(linear)


@contextlib.contextmanager
def dense_weights(model: nn.Module) -> Iterator[None]:
    """Hold every 4-bit linear's weight dequantized in its compute dtype, if half of the free memory is enough.

    Nothing is merged, and every product has the same operands. Afterwards the 4-bit linears are back, untouched.
    Weights of a sharded base stay as they are: no process has them all.
    """
    linears: list[tuple[nn.Module, str, Any]] = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is bnb.nn.Linear4bit and not isinstance(child.weight, DTensor)
    ]
    n_bytes = sum(linear.in_features * linear.out_features * _dtype_of(linear).itemsize for _, _, linear in linears)
    if n_bytes > free_bytes(next(model.parameters()).device) / 2:
        linears = []
    try:
        for parent, name, linear in linears:
            setattr(parent, name, _build_dense(linear))
        yield
    finally:
        for parent, name, linear in linears:
            setattr(parent, name, linear)


def _dtype_of(linear: Any) -> torch.dtype:
    dtype: torch.dtype = linear.compute_dtype or linear.weight.quant_state.dtype
    return dtype


@torch.no_grad()
def _build_dense(linear: Any) -> nn.Linear:
    dtype = _dtype_of(linear)
    dense = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    weight = dequantize(linear.weight.data, linear.weight.quant_state).to(dtype)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        dense.bias = nn.Parameter(linear.bias.to(dtype), requires_grad=False)
    return dense.train(linear.training)
