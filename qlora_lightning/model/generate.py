"""Answers to prompts, greedily: in flat batches against a cache of keys and values."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import bitsandbytes as bnb
import peft
import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qlora_lightning.model.layers.attention import NO_MASK, check_attends_flatly
from qlora_lightning.model.layers.elementwise import rope_limit
from qlora_lightning.model.layers.kv_cache import KeyValueCache
from qlora_lightning.model.step.layout import Samples, whole_samples
from qlora_lightning.model.step.loss import head_of

BATCH_SIZE = 64  # rows that are answered together
TOKEN_BUDGET = 32_768  # keys and values that are kept at a time: of SmolLM2-135M 0.75 GB, of Llama-3.1-8B 4.3 GB
_FEW_PROMPTS = 4  # for so few bitsandbytes multiplies packed weights on every card
_SHARE = 0.5  # of the free memory that the dense weights may take
_STILL_GOING = 0.75  # of a batch: with no more the others leave it, which copies all keys and values


@contextlib.contextmanager
def dense_weights(model: nn.Module) -> Iterator[bool]:
    """Hold every 4-bit linear's weight in its compute dtype, as it is multiplied anyway, if there is memory for it.

    Nothing is merged: adapters act as before, and every product has the same operands. Afterwards the 4-bit linears
    are back, untouched. A second call inside the first changes nothing.

    Weights of a sharded base stay as they are: no process has them all.

    Yields:
        Whether the weights are dense now.
    """
    children = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    linears: list[tuple[nn.Module, str, Any]] = [each for each in children if type(each[2]) is bnb.nn.Linear4bit]
    is_sharded = any(isinstance(linear.weight, DTensor) for _, _, linear in linears)
    if not linears or is_sharded or not _fits([linear for _, _, linear in linears]):
        yield not linears
        return
    try:
        for parent, name, linear in linears:
            setattr(parent, name, _make_dense(linear))
        yield True
    finally:
        for parent, name, linear in linears:
            setattr(parent, name, linear)


def _fits(linears: list[Any]) -> bool:
    needed = sum(linear.in_features * linear.out_features * _dtype_of(linear).itemsize for linear in linears)
    device = linears[0].weight.device
    if device.type == "cuda":  # what torch has cached is free too
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return bool(needed <= _SHARE * (torch.cuda.mem_get_info(device)[0] + cached))
    return bool(needed <= _SHARE * psutil.virtual_memory().available)


def _dtype_of(linear: Any) -> torch.dtype:
    dtype: torch.dtype = linear.compute_dtype or linear.weight.quant_state.dtype
    return dtype


@torch.no_grad()
def _make_dense(linear: Any) -> nn.Linear:
    dtype = _dtype_of(linear)
    dense = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    weight = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(dtype)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        dense.bias = nn.Parameter(linear.bias.to(dtype), requires_grad=False)
    return dense.train(linear.training)


def generate_answers(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int = 128,
    batch_size: int = BATCH_SIZE,
    watch: Callable[[int], None] = lambda rows: None,
) -> list[list[int]]:
    """Continue each prompt greedily until a stop token; in float32 an answer is the same whatever it is batched with.

    Rows of like length go together. The prompts of a batch run as one flat stream, then one token of each row at a time
    against its keys and values; rows that have stopped leave the batch, some at a time. 4-bit weights are dequantized
    once for all of it, if there is memory for that; a GPU multiplies a few rows by the packed ones. The model's mode is
    restored.

    Args:
        model: A causal language model of transformers or PEFT, which attends flatly.
        prompts: Token ids of each prompt.
        stop_ids: Tokens that end an answer.
        max_new_tokens: Tokens after which an answer is cut.
        batch_size: Rows of a batch at most; fewer if ``TOKEN_BUDGET`` would be passed.
        watch: Called with the number of rows that are done now.

    Returns:
        The ids of each answer, without the stop token: one shorter than ``max_new_tokens`` has stopped by itself.
    """
    causal_lm: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    check_attends_flatly(causal_lm)
    answers: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        packed = len(prompts) <= _FEW_PROMPTS and next(model.parameters()).is_cuda
        with torch.no_grad(), contextlib.nullcontext() if packed else dense_weights(model):
            limit = rope_limit(causal_lm.config)
            for rows in _batches([len(prompt) for prompt in prompts], max_new_tokens, batch_size, limit):
                found = _generate(causal_lm, [prompts[row] for row in rows], frozenset(stop_ids), max_new_tokens)
                for row, answer in zip(rows, found, strict=True):
                    answers[row] = answer
                watch(len(rows))
    finally:
        model.train(was_training)
    return answers


def _batches(lengths: list[int], max_new_tokens: int, batch_size: int, limit: int | None) -> Iterator[list[int]]:
    """Put rows of like length together, the longest first: memory that does not suffice fails at once.

    A row that may grow beyond ``limit``, see :func:`rope_limit`, is alone.
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        longest = lengths[batch[0] if batch else row] + max_new_tokens
        alone = limit is not None and longest > limit
        if batch and (alone or len(batch) == batch_size or (len(batch) + 1) * longest > TOKEN_BUDGET):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _generate(
    causal_lm: Any, prompts: Sequence[Sequence[int]], stop_ids: frozenset[int], max_new_tokens: int
) -> list[list[int]]:
    device = causal_lm.base_model.norm.weight.device  # the embedding may be sharded, and its shards on the host
    lengths = [len(prompt) for prompt in prompts]
    cache = KeyValueCache(lengths, max_new_tokens, device)

    def choose_next(ids: Tensor, positions: Tensor, samples: Samples | None, last: Tensor | None = None) -> Tensor:
        """Run the model over a flat batch and return the most likely token behind each row's last one, ``(rows,)``."""
        output = causal_lm.base_model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=NO_MASK,
            samples=samples,
            kv_cache=cache,
            use_cache=False,
        )
        hidden: Tensor = output.last_hidden_state[0]  # (tokens, width)
        logits: Tensor = head_of(causal_lm)(hidden if last is None else hidden[last])
        return logits.argmax(-1)

    samples = whole_samples(lengths).to(device)
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    chosen = choose_next(ids, positions, samples, samples.cu_seqlens[1:] - 1)

    answers: list[list[int]] = [[] for _ in prompts]
    batch = list(range(len(prompts)))  # which row is where
    going = set(batch)
    for left in range(max_new_tokens, 0, -1):
        for row, token in zip(batch, chosen.tolist(), strict=True):
            if token in stop_ids:
                going.discard(row)
            elif row in going:
                answers[row].append(token)
        if not going or left == 1:
            break
        if len(going) <= _STILL_GOING * len(batch):
            places = [place for place, row in enumerate(batch) if row in going]
            batch = [batch[place] for place in places]
            cache.keep(places)
            chosen = chosen[places]
        cache.begin_step()
        chosen = choose_next(chosen, cache.lengths, None)
        cache.end_step()
    return answers
