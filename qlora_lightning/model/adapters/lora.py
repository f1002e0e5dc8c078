"""Puts LoRA adapters on a frozen base, by PEFT, and names the tensors that train."""

import contextlib
import copy
import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_lightning.base.adapter_folder import ALPHA, PATTERNS
from qlora_lightning.model.adapters.targets import compact_targets, resolve_targets
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import find_fault
from qlora_lightning.support.versions import without_peft_warnings

OURS = {
    "r": "model.rank",
    "lora_alpha": "model.alpha",
    "lora_dropout": "model.dropout",
    "target_modules": "model.target_modules",
    "exclude_modules": "model.target_modules",
    "layers_to_transform": "model.layers",
    "layers_pattern": "model.layers",
    "base_model_name_or_path": "model.base",
    "revision": "model.revision",
}
_ALLOWED = {
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
}
_ALLOWED_INITS = (True, False, "gaussian", "orthogonal")
_REWRITES_BASE = "it rewrites the frozen base's own weights, and the adapter would then fit no other copy of the base"
_NEEDS_DATA = "it needs a pass over data before training, which this framework does not make"
_REFUSED_INITS = {
    "pissa": _REWRITES_BASE,
    "olora": _REWRITES_BASE,
    "corda": f"{_REWRITES_BASE}; also {_NEEDS_DATA}",
    "loftq": f"it needs the weights before quantization; also {_REWRITES_BASE}",
    "lora_ga": f"{_REWRITES_BASE}; also {_NEEDS_DATA}",
    "eva": _NEEDS_DATA,
    "mica": "it needs the weights before quantization",
}


def check_lora_options(options: dict[str, Any], model: nn.Module, tied_embeddings: bool) -> None:
    """Refuse options that cannot work on a frozen, quantized base, each with its reason.

    Args:
        options: What the user wrote under ``model.lora_options``.
        model: The base, without adapters.
        tied_embeddings: Whether the head shares the embedding's weight.

    Raises:
        UserError: An option is unknown, has its own key, or cannot work.
    """
    for name, value in options.items():
        _check_name(name)
        if name == "init_lora_weights":
            _check_init(value, model)
    fault = find_fault(options, PATTERNS, "model.lora_options")
    if fault:
        raise UserError(f"{fault}.")
    modules = options.get("modules_to_save") or []
    for module in modules:
        _check_module_to_save(module, model)
    if tied_embeddings and {"embed_tokens", "lm_head"} & set(modules) and not options.get("ensure_weight_tying"):
        raise UserError(
            f"model.lora_options.modules_to_save is {modules}, but this base ties head and embedding: trained alone "
            "they would part. Add `ensure_weight_tying: true` with modules_to_save: [embed_tokens], "
            "or train single tokens with trainable_token_indices."
        )


def _check_name(name: str) -> None:
    if name in OURS:
        raise UserError(f"model.lora_options sets {name!r}, which has a key of its own: set {OURS[name]}.")
    if name in _ALLOWED:
        return
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    if name in known:
        raise UserError(
            f"model.lora_options sets {name!r}: refused, since it is not verified on a frozen, quantized base. "
            f"Options that are: {', '.join(sorted(_ALLOWED))}."
        )
    nearest = difflib.get_close_matches(name, _ALLOWED, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else f" Known: {', '.join(sorted(_ALLOWED))}."
    raise UserError(f"model.lora_options has {name!r}, which peft.LoraConfig does not know.{hint}")


def _check_init(value: Any, model: nn.Module) -> None:
    if value == "orthogonal" and any(_is_quantized(module) for module in model.modules()):
        raise UserError(
            "model.lora_options.init_lora_weights is 'orthogonal': refused on a quantized base, since PEFT makes the "
            "matrices in the dtype in which the weights are stored, and integers have no gradient."
        )
    if value in _ALLOWED_INITS:
        return
    for name, reason in _REFUSED_INITS.items():
        if str(value).lower().startswith(name):
            raise UserError(f"model.lora_options.init_lora_weights is {value!r}: refused, since {reason}.")
    raise UserError(
        f"model.lora_options.init_lora_weights is {value!r}: expected one of "
        f"{', '.join(str(choice) for choice in _ALLOWED_INITS)}."
    )


def _check_module_to_save(name: str, model: nn.Module) -> None:
    matches = [module for full, module in model.named_modules() if full == name or full.endswith(f".{name}")]
    if not matches:
        raise UserError(f"model.lora_options.modules_to_save names {name!r}, but the base has no such module.")
    if any(_is_quantized(module) for module in matches):
        raise UserError(
            f"model.lora_options.modules_to_save names {name!r}, which is quantized: integers have no gradient. "
            "Put an adapter on it with model.target_modules instead."
        )


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module) is not nn.Linear


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
        lora_options: Handed to ``peft.LoraConfig``; see :mod:`qlora_lightning.model.adapters.lora`.
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
    with torch.random.fork_rng(devices=[]):  # PEFT draws them on the CPU
        torch.manual_seed(torch.initial_seed())
        yield
