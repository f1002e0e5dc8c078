"""Puts LoRA adapters on a frozen base, by PEFT, and names the tensors that train."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_lightning.adapter.shape import ALPHA
from qlora_lightning.errors import UserError
from qlora_lightning.json_shape import find_fault
from qlora_lightning.model.adapters.lora_options import check_lora_options
from qlora_lightning.model.adapters.targets import compact_targets, resolve_targets
from qlora_lightning.support.versions import without_peft_warnings

ADAPTER = "default"  # PEFT's name for the adapter that a model is made with


def add_adapters(
    model: PreTrainedModel,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | list[str] = "all-linear",
    layers: str | list[int] = "all",
    lora_options: dict[str, Any] | None = None,
    base_name: str | None = None,
) -> peft.PeftModel:
    """Inject A ``(rank, in)`` and B ``(out, rank)`` beside each target; B starts at zero, so nothing changes yet.

    PEFT computes ``W x + alpha / rank · B A x``, and with rsLoRA (``lora_options: {use_rslora: true}``)
    ``alpha / sqrt(rank)``. The adapters are fp32 whatever the base is.

    Args:
        model: The frozen base.
        rank: Rows of A and columns of B.
        alpha: Multiplier of the update; ``None`` means ``2 × rank``.
        dropout: Probability with which an input of A is dropped in training.
        target_modules: See :func:`qlora_lightning.model.adapters.targets.resolve_targets`.
        layers: Likewise.
        lora_options: Handed to ``peft.LoraConfig``; see :mod:`qlora_lightning.model.adapters.lora_options`.
        base_name: Written into the adapter's config as ``base_model_name_or_path``.

    Raises:
        UserError: A value cannot work.
    """
    options = copy.deepcopy(lora_options or {})  # PEFT writes into lists that it is handed
    check_adapter_settings(rank, alpha, dropout)
    tied = bool(model.config.tie_word_embeddings)
    check_lora_options(options, model, tied)
    targets = resolve_targets(model, target_modules, layers)
    _check_tied_targets(targets, tied)
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=compact_targets(model, targets),
        **options,
    )
    with _seeded_initialization(), without_peft_warnings():
        adapted = peft.get_peft_model(model, config)
    adapted.peft_config[ADAPTER].base_model_name_or_path = base_name
    return _with_float32_masters(adapted)


def check_adapter_settings(rank: int, alpha: float | None, dropout: float) -> None:
    """Refuse what no base could take; see :func:`add_adapters`.

    Raises:
        UserError: A value is out of range.
    """
    if rank < 1:
        raise UserError(f"model.rank is {rank}: expected a positive integer, such as 8.")
    fault = find_fault(alpha, ALPHA, "model.alpha")
    if fault:
        raise UserError(f"{fault}, such as {2 * rank}.")
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"model.dropout is {dropout}: expected a probability in [0, 1).")


def load_adapters(model: PreTrainedModel, folder: str, *, bare: bool = False) -> peft.PeftModel:
    """Put the adapter of an adapter folder on the base, to go on training it; its own rank and targets rule.

    Args:
        model: The base.
        folder: The adapter folder.
        bare: The base lies on the meta device, and so will the adapter: shapes alone.
    """
    with without_peft_warnings():
        adapted = peft.PeftModel.from_pretrained(model, folder, is_trainable=True, low_cpu_mem_usage=bare)
    return _with_float32_masters(adapted)


def trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every tensor that trains, by name: the adapter, and nothing of the base."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def all_names_of_trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Give them again, a tied one under each of its names: what PEFT's format wants."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def copy_tensors(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Set the trainable tensors to ``tensors``; every name and shape must be there, and no other.

    Args:
        model: The model, with adapters.
        tensors: Values by name.
        source: What they come from, for the message.

    Raises:
        UserError: Names or shapes differ.
    """
    own = trainable_tensors(model)
    missing, foreign = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or foreign:
        shown = ", ".join((missing or foreign)[:3])
        raise UserError(
            f"{source} does not fit the adapter of this model: {len(missing)} tensors are missing and {len(foreign)} "
            f"are foreign ({shown}, …). Use the target_modules, layers and lora_options that it was trained with."
        )
    remedy = "Use the model.rank that it was trained with."
    copy_matching(own, tensors, f"{source} does not fit the adapter of this model", remedy)


def copy_matching(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], misfit: str, remedy: str) -> None:
    """Set tensors to others of the same names, if all have the same shapes; else none is touched.

    Args:
        own: What is written to.
        tensors: Values by name, each of them there.
        misfit: How the sentence about another shape begins.
        remedy: How it ends.

    Raises:
        UserError: A shape differs.
    """
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            there, here = tuple(tensors[name].shape), tuple(tensor.shape)
            raise UserError(f"{misfit}: {name} has shape {there} there and {here} here. {remedy}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _check_tied_targets(targets: list[str], tied: bool) -> None:
    apart = [name for name in targets if tied and name.endswith(("embed_tokens", "lm_head"))]
    if apart:
        raise UserError(
            f"model.target_modules selects {apart[0]}, but this base ties head and embedding: an adapter on one would "
            "part them. Train single tokens with lora_options: {trainable_token_indices: …} instead."
        )


def _with_float32_masters(model: peft.PeftModel) -> peft.PeftModel:
    """Hold all that trains in fp32: PEFT does so for A and B, not for whole modules and tokens trained beside."""
    for parameter in trainable_tensors(model).values():
        parameter.data = parameter.data.float()
    return model


@contextlib.contextmanager
def _seeded_initialization() -> Iterator[None]:
    """Draw A from the seed alone, not from what else drew before, and leave the generators as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(torch.initial_seed())
        yield
