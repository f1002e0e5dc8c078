"""Puts LoRA adapters on a frozen base, by PEFT, and names the tensors that train."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_lightning.model.adapters.targets import compact_targets, resolve_targets
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.versions import without_peft_warnings

ADAPTER = "default"  # PEFT's name for the adapter that a model is made with
_VERIFIED = (  # options of peft.LoraConfig, on a frozen, quantized base
    *("alpha_pattern", "ensure_weight_tying", "init_lora_weights", "modules_to_save", "rank_pattern"),
    *("trainable_token_indices", "use_dora", "use_rslora"),
)


def check_options(options: Mapping[str, Any], source: str) -> None:
    """Reject options that are not verified, and starts of A and B that go wrong on a quantized base.

    PEFT quantizes the base once more for ``olora`` and begins a plain adapter for ``eva`` and ``lora_ga``, without a
    word; ``pissa``, ``corda`` and ``loftq`` need the weights from before quantization.
    """
    for name, value in options.items():
        if name not in _VERIFIED:
            raise UserError(f"{source} sets {name}: expected one of {', '.join(_VERIFIED)}.")
        if name == "init_lora_weights" and value not in (True, False, "gaussian", "orthogonal"):
            raise UserError(
                f"{source} sets {name} to {value!r}, which does not work on a quantized base: expected true, false, "
                "gaussian or orthogonal."
            )


def check_adapter_settings(rank: int, alpha: float | None, dropout: float) -> None:
    """Reject what no base could take; see :func:`add_adapters`."""
    if rank < 1:
        raise UserError(f"model.rank is {rank}: expected a positive integer, such as 8.")
    if alpha is not None and not 0 < alpha < float("inf"):
        raise UserError(f"model.alpha is {alpha}: expected a positive number, such as {2 * rank}.")
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"model.dropout is {dropout}: expected a probability in [0, 1).")


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
        target_modules: See :func:`~qlora_lightning.model.adapters.targets.resolve_targets`, as for ``layers``.
        layers: Which decoder layers.
        lora_options: More arguments of ``peft.LoraConfig``; see :func:`check_options`.
        base_name: Written into the adapter's config as ``base_model_name_or_path``.
    """
    options = copy.deepcopy(lora_options or {})  # PEFT writes into lists that it is handed
    check_options(options, "model.lora_options")
    targets = resolve_targets(model, target_modules, layers)
    trained = options.get("modules_to_save") or []
    for ending in trained:  # which PEFT passes over
        if not any(name.endswith(ending) for name, _ in model.named_modules()):
            raise UserError(f"model.lora_options.modules_to_save names {ending}, which the base does not have.")
    alone = targets if options.get("ensure_weight_tying") else [*targets, *trained]
    tied = {"embed_tokens", "lm_head"} & {name.rpartition(".")[2] for name in alone}
    if tied and model.config.tie_word_embeddings:
        raise UserError(
            f"This base ties head and embedding, and to train {min(tied)} alone would part them: set "
            "model.lora_options to {modules_to_save: [embed_tokens], ensure_weight_tying: true}, or train single "
            "tokens with {trainable_token_indices: …}."
        )
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        base_model_name_or_path=base_name,
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=compact_targets(model, targets),
        **options,
    )
    return inject(model, config)


def inject(model: PreTrainedModel, config: peft.LoraConfig) -> peft.PeftModel:
    """Let PEFT put an adapter on the base: drawn from the seed alone, whatever drew before, and in fp32.

    On a base on the meta device the adapter's tensors are shapes alone too.
    """
    name, config.base_model_name_or_path = config.base_model_name_or_path, None  # or PEFT warns that it renames it
    on_meta = model.device.type == "meta"
    with torch.random.fork_rng(devices=[]), without_peft_warnings():
        torch.default_generator.manual_seed(torch.initial_seed())  # PEFT draws on the CPU
        with torch.device("meta") if on_meta else contextlib.nullcontext():
            adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=on_meta)
    adapted.peft_config[ADAPTER].base_model_name_or_path = name
    for parameter in trainable_tensors(adapted).values():  # PEFT leaves whole modules and tokens in the base's dtype
        parameter.data = parameter.data.float()
    return adapted


def trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every tensor that trains, by name: the adapter, and nothing of the base."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora_matrices(layer: LoraLayer, adapter: str = ADAPTER) -> tuple[Tensor, Tensor]:
    """Return A ``(rank, in)`` and B ``(out, rank)`` of a linear, or of an embedding."""
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]


@contextlib.contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Disable the adapters; afterwards the same tensors train."""
    with _training_as_before(model), model.disable_adapter():
        yield


@contextlib.contextmanager
def with_adapter(model: Any, name: str) -> Iterator[None]:
    """Switch to another adapter, also within :func:`without_adapters`; afterwards all is as before."""
    active, was_disabled = model.active_adapter, model.get_model_status().enabled is False
    with _training_as_before(model):
        model.set_adapter(name)
        model.enable_adapter_layers()
        try:
            yield
        finally:
            model.set_adapter(active)
            if was_disabled:
                model.disable_adapter_layers()


@contextlib.contextmanager
def _training_as_before(model: nn.Module) -> Iterator[None]:
    """Let the same tensors train afterwards: PEFT's switches let all of an active adapter train."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trains in trained:
            parameter.requires_grad_(trains)


def copy_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Set the trainable tensors to ``tensors``, which come from ``source``; if one does not fit, none is changed."""
    own = trainable_tensors(model)
    check_fit(own, tensors, source)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def check_fit(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], source: str) -> None:
    """Reject tensors of ``source`` that have other names or shapes than the model's own."""
    mine, theirs = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (own, stored))
    odd = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if odd:
        there, here = (shapes.get(odd[0], "missing") for shapes in (theirs, mine))
        raise UserError(
            f"{source} does not fit the adapter of this model: {len(odd)} tensors differ ({odd[0]} is {there} there, "
            f"{here} here). Use the base, rank, target_modules, layers and lora_options that it was trained with."
        )
