"""Answers to prompts, greedily: in flat batches against a cache, or by transformers' generation."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import bitsandbytes as bnb
import peft
import psutil
import torch
from torch import Tensor, nn

from qlora_lightning.model.layers.attention import NO_MASK, attends_flatly
from qlora_lightning.model.layers.elementwise import rope_limit
from qlora_lightning.model.layers.kv_cache import KeyValueCache
from qlora_lightning.model.layout import Samples, whole_samples

_SHARE = 0.5  # of the free memory that the dense weights may take


@contextlib.contextmanager
def dense_weights(model: nn.Module) -> Iterator[bool]:
    """Hold every 4-bit linear's weight in its compute dtype, as it is multiplied anyway, if there is memory for it.

    Nothing is merged: adapters act as before, and every product has the same operands. Afterwards the 4-bit linears
    are back, untouched. A second call inside the first changes nothing.

    Yields:
        Whether the weights are dense now.
    """
    linears = _quantized_linears(model)
    if not linears or not _fits(linears):
        yield not linears
        return
    try:
        for parent, name, linear in linears:
            setattr(parent, name, _made_dense(linear))
        yield True
    finally:
        for parent, name, linear in linears:
            setattr(parent, name, linear)


def _quantized_linears(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    return [(parent, name, child) for parent, name, child in found if type(child) is bnb.nn.Linear4bit]


def _fits(linears: list[tuple[nn.Module, str, Any]]) -> bool:
    needed = sum(linear.in_features * linear.out_features * _dtype_of(linear).itemsize for _, _, linear in linears)
    device = linears[0][2].weight.device
    if device.type == "cuda":  # what torch has cached is free too
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return bool(needed <= _SHARE * (torch.cuda.mem_get_info(device)[0] + cached))
    return bool(needed <= _SHARE * psutil.virtual_memory().available)


def _dtype_of(linear: Any) -> torch.dtype:
    dtype: torch.dtype = linear.compute_dtype or linear.weight.quant_state.dtype
    return dtype


@torch.no_grad()
def _made_dense(linear: Any) -> nn.Linear:
    weight = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(_dtype_of(linear))
    has_bias = linear.bias is not None
    dense = nn.Linear(linear.in_features, linear.out_features, bias=has_bias, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if has_bias:
        dense.bias = nn.Parameter(linear.bias.to(weight.dtype), requires_grad=False)
    return dense.train(linear.training)


@torch.no_grad()
def generate_padded(
    model: Any, prompts: Sequence[Sequence[int]], stop_ids: Collection[int], max_new_tokens: int
) -> list[list[int]]:
    """Continue each prompt greedily until a stop token; the prompts form one batch, padded on the left.

    Args:
        model: A causal language model of transformers or PEFT, in evaluation mode.
        prompts: Token ids of each prompt.
        stop_ids: Tokens that end an answer.
        max_new_tokens: Tokens after which an answer is cut.

    Returns:
        The ids of each answer, without the stop token.
    """
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    padding = min(stop_ids)  # any id will do: the mask hides it
    ids = torch.tensor([[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    output: torch.Tensor = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        # a base's own sampling settings would be warned about, since this is greedy
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids),
        pad_token_id=padding,
    )
    return [_cut(row, stop_ids) for row in output[:, longest:].tolist()]


def _cut(ids: list[int], stop_ids: Collection[int]) -> list[int]:
    ends = [position for position, token in enumerate(ids) if token in stop_ids]
    return ids[: ends[0]] if ends else ids


BATCH_SIZE = 64  # rows that are answered together
_STILL_GOING = 0.75  # of a batch: with no more the others leave it, which copies all keys and values
TOKEN_BUDGET = 32_768  # keys and values that are kept at a time: of SmolLM2-135M 0.75 GB, of Llama-3.1-8B 4.3 GB


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
    once for all of it, where there is memory for that. The model's training mode is put back afterwards: a model that
    generated would else stay in ``eval()``.

    Args:
        model: A causal language model of transformers or PEFT; one whose attention is not ours takes transformers'
            own ``generate``, padded on the left.
        prompts: Token ids of each prompt.
        stop_ids: Tokens that end an answer.
        max_new_tokens: Tokens after which an answer is cut.
        batch_size: Rows of a batch at most; fewer where ``TOKEN_BUDGET`` would be passed.
        watch: Told how many more rows are done.

    Returns:
        The ids of each answer, without the stop token: one shorter than ``max_new_tokens`` has stopped by itself.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), dense_weights(model):
            limit = rope_limit(_causal_lm(model).config)
            for rows in _batches([len(prompt) for prompt in prompts], max_new_tokens, batch_size, limit):
                batch = [list(prompts[row]) for row in rows]
                generate = _generate_flat if attends_flatly(_causal_lm(model)) else generate_padded
                found = generate(model, batch, frozenset(stop_ids), max_new_tokens)
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


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def _generate_flat(
    model: nn.Module, prompts: list[list[int]], stop_ids: frozenset[int], max_new_tokens: int
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    batch = list(range(len(prompts)))  # which row is where
    going = set(batch)
    step = _Step(model, prompts, max_new_tokens)
    chosen = step.read_prompts(prompts)
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
            step.cache.keep(places)
            chosen = chosen[places]
        chosen = step.read_tokens(chosen)
    return answers


class _Step:
    """Runs the model over a flat batch, and chooses the most likely next token of each row.

    Args:
        model: The model.
        prompts: Ids of each.
        room: Tokens that may follow.
    """

    def __init__(self, model: nn.Module, prompts: list[list[int]], room: int) -> None:
        self.causal_lm = _causal_lm(model)
        self.device = self.causal_lm.get_input_embeddings().weight.device
        self.cache = KeyValueCache([len(prompt) for prompt in prompts], room, self.device)

    def read_prompts(self, prompts: list[list[int]]) -> Tensor:
        """Give the first token of each answer, ``(rows,)``."""
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        positions = torch.cat([torch.arange(len(prompt), device=self.device) for prompt in prompts])
        samples = whole_samples([len(prompt) for prompt in prompts]).to(self.device)
        hidden = self._run(ids, positions, samples)
        return self._choose(hidden[samples.cu_seqlens[1:] - 1])

    def read_tokens(self, tokens: Tensor) -> Tensor:
        """Give the token behind the latest one of each row, ``(rows,)``."""
        self.cache.begin_step()
        hidden = self._run(tokens, self.cache.lengths, None)
        self.cache.end_step()
        return self._choose(hidden)

    def _run(self, ids: Tensor, positions: Tensor, samples: Samples | None) -> Tensor:
        output = self.causal_lm.base_model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=NO_MASK,
            samples=samples,
            kv_cache=self.cache,
            use_cache=False,
        )
        hidden: Tensor = output.last_hidden_state[0]  # (tokens, width)
        return hidden

    def _choose(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.causal_lm.get_output_embeddings()(hidden)
        return logits.argmax(-1)
