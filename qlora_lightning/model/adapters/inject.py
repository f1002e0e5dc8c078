"""LoRA adapters put on a frozen base, by PEFT: on which modules, and the tensors that train."""

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_lightning.model.layers.experts import PackedExperts, adapting_experts, expert_parameters, routers_of
from qlora_lightning.model.model_types import LINEARS, decoder_layers, layer_of, linear_sizes
from qlora_lightning.support.errors import UserError, explaining
from qlora_lightning.support.trainer import say_once

ADAPTER = "default"  # PEFT's name for the adapter that a model is made with
_OPTIONS = (  # of peft.LoraConfig, verified on a frozen, quantized base
    *("alpha_pattern", "ensure_weight_tying", "init_lora_weights", "modules_to_save", "rank_pattern"),
    *("trainable_token_indices", "use_dora", "use_rslora"),
)
PRESETS = ("all-linear", "attention", "mlp")  # the last is what is not attention
_BYPASSED = {  # linears whose weight these types read without the adapter: in a kernel, or if they are not quantized
    "out_proj": ("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"),
    "dt_proj": ("falcon_mamba", "jamba"),
}


def check_adapter_settings(
    rank: int, alpha: float | None, dropout: float, target_experts: bool, lora_options: Mapping[str, Any] | None
) -> None:
    """Reject what no base could take; see :func:`add_adapters`."""
    options = lora_options or {}
    if target_experts and (dropout or options.get("use_dora") or options.get("init_lora_weights") == "orthogonal"):
        raise UserError(
            "model.target_experts is true, and adapters of experts take no dropout, use_dora or orthogonal "
            "init_lora_weights: leave these out, or set it to false.",
            "model.target_experts",
        )
    if rank < 1:
        raise UserError(f"model.rank is {rank}: expected a positive integer, such as 8.", "model.rank")
    if alpha is not None and not 0 < alpha < float("inf"):
        raise UserError(f"model.alpha is {alpha}: expected a positive number, such as {2 * rank}.", "model.alpha")
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"model.dropout is {dropout}: expected a probability in [0, 1).", "model.dropout")


def add_adapters(
    model: PreTrainedModel,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | list[str] = "all-linear",
    layers: str | list[int] = "all",
    target_experts: bool = False,
    lora_options: dict[str, Any] | None = None,
) -> peft.PeftModel:
    """Inject A ``(rank, in)`` and B ``(out, rank)`` beside each target; B starts at zero, so nothing changes yet.

    PEFT computes ``W x + alpha / rank · B A x``, and with rsLoRA ``alpha / sqrt(rank)``. The adapters are fp32 whatever
    the base is. The arguments are those of :class:`~qlora_lightning.QLoRAModule`.
    """
    options = copy.deepcopy(lora_options or {})  # PEFT modifies the lists that it gets
    named = resolve_targets(model, target_modules, layers)
    targets = _without_moved(model, named) if target_modules in PRESETS else named
    parameters = [name for name in expert_parameters(model) if layer_of(name) in map(layer_of, named)]
    if target_experts and not parameters:
        raise UserError(
            f"model.target_experts is true, and a {model.config.model_type} has no experts for adapters.",
            "model.target_experts",
        )
    linears = [module for module in map(model.get_submodule, targets) if isinstance(module, LINEARS)]
    if rank > (widest := max((max(linear_sizes(linear)) for linear in linears), default=rank)):
        raise UserError(
            f"model.rank is {rank:,}, and no module that would carry it is wider than {widest:,}.", "model.rank"
        )
    _check_options(model, options, targets)
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=targets,
        target_parameters=parameters if target_experts else None,
        **options,
    )
    adapted = inject(model, config)
    adapted_names = adapted.base_model.targeted_module_names
    if missing := [name for name in targets if name not in adapted_names]:  # PEFT moves some to fused experts
        raise UserError(
            f"model.target_modules has {missing[0]}, on which PEFT puts no adapter in a {model.config.model_type}: "
            "expected other modules, such as attention.",
            "model.target_modules",
        )
    return adapted


def _without_moved(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """Return the targets that PEFT takes: in some mixtures it moves adapters of an MLP's names to the experts."""
    config = peft.LoraConfig(target_modules=targets)
    with contextlib.suppress(ValueError):  # it moves some names only together
        convert_peft_config_for_transformers(config, model, None)
    remaining = [name for name in targets if name in config.target_modules]
    if moved := dict.fromkeys(name.rpartition(".")[2] for name in targets if name not in remaining):
        say_once(f"PEFT puts no adapters on {', '.join(moved)} beside the experts of a {model.config.model_type}.")
    if not remaining:
        raise UserError(
            "On no module of model.target_modules PEFT puts an adapter: set it to all-linear or attention.",
            "model.target_modules",
        )
    return remaining


def _check_options(model: PreTrainedModel, options: Mapping[str, Any], targets: list[str]) -> None:
    """Reject options that PEFT would silently ignore, or apply wrongly on this base.

    PEFT quantizes the base once more for ``olora`` and starts a plain adapter for ``eva`` and ``lora_ga``; ``pissa``,
    ``corda`` and ``loftq`` need the weights from before quantization.
    """
    unknown, init = [*(options.keys() - set(_OPTIONS))], options.get("init_lora_weights", True)
    if unknown:
        raise UserError(
            f"model.lora_options sets {unknown[0]}: expected one of {', '.join(_OPTIONS)}.", "model.lora_options"
        )
    if init not in (True, False, "gaussian", "orthogonal"):
        raise UserError(
            f"model.lora_options sets init_lora_weights to {init!r}, which does not work on a quantized base: "
            "expected true, false, gaussian or orthogonal.",
            "model.lora_options",
        )
    saved_modules = options.get("modules_to_save") or []
    for ending in saved_modules:
        if not any(name.endswith(ending) for name, _ in model.named_modules()):
            raise UserError(
                f"model.lora_options.modules_to_save names {ending}, which the base does not have.",
                "model.lora_options",
            )
    for pattern in (*(options.get("rank_pattern") or {}), *(options.get("alpha_pattern") or {})):
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):  # as PEFT does
            raise UserError(
                f"model.lora_options has a pattern for {pattern}, which carries no adapter.", "model.lora_options"
            )
    untied = targets if options.get("ensure_weight_tying") else [*targets, *saved_modules]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules() if module in (embedding, head)}
    ties = getattr(model.config, "tie_word_embeddings", False)
    if ties and {*names.values()} & {name.rpartition(".")[2] for name in untied}:
        raise UserError(
            "This base ties head and embedding, and to train one alone would part them: set model.lora_options to "
            f"{{modules_to_save: [{names[embedding]}], ensure_weight_tying: true}}.",
            "base.tied",
        )


def resolve_targets(model: Any, target_modules: str | list[str], layers: str | list[int] = "all") -> list[str]:
    """Return the full name of every module that is to carry an adapter, in the model's order.

    Args:
        model: The base, without adapters.
        target_modules: ``all-linear`` (every linear of the decoder layers but routers), ``attention``, ``mlp``, a list
            of names (``q_proj``, or longer endings), or a regular expression that matches full names.
        layers: ``all``, ``last:N``, or a list of layer indices counted from 0.
    """
    modules = [*model.named_modules()]
    candidates = [name for name, module in modules if isinstance(module, (*LINEARS, nn.Embedding))]
    candidates = [name for name in candidates if not isinstance(model.get_submodule(name), PackedExperts)]
    in_layers = {module for layer in decoder_layers(model) for module in layer.modules()} - routers_of(model)
    names_in_layers = {name for name in candidates if model.get_submodule(name) in in_layers}
    bypassed = {f".{name}" for name, types in _BYPASSED.items() if model.config.model_type in types}
    names_in_layers = {name for name in names_in_layers if not name.endswith((*bypassed,))}
    selected = _select_by_name(candidates, names_in_layers, target_modules)
    chosen_layers = {None, *_select_layers(candidates, layers)}  # None: modules outside of layers
    targets = [name for name in candidates if name in selected and layer_of(name) in chosen_layers]
    if not targets:
        raise UserError(
            f"model.target_modules {target_modules!r} has no module in model.layers {layers!r}.", "model.layers"
        )
    return targets


def _select_by_name(candidates: list[str], in_layers: set[str], target_modules: str | list[str]) -> set[str]:
    if isinstance(target_modules, str) and target_modules in PRESETS:
        attention = {name for name in in_layers if "attn" in name or "attention" in name}  # in any type
        return {"all-linear": in_layers, "attention": attention, "mlp": in_layers - attention}[target_modules]
    selected: set[str] = set()
    for ending in [target_modules] if isinstance(target_modules, str) else target_modules:
        matches = {name for name in candidates if f".{name}".endswith(f".{ending}")}
        if isinstance(target_modules, str):
            with contextlib.suppress(re.error):  # it may be no expression: *proj
                matches |= {name for name in candidates if re.fullmatch(ending, name)}
        if not matches:
            names = dict.fromkeys([*PRESETS, *(name.rpartition(".")[2] for name in candidates)])
            raise UserError(
                f"model.target_modules names {ending!r}, which the base does not have: expected {', '.join(names)}, "
                f"or an expression that matches a full name such as {candidates[1]}.",
                "model.target_modules",
            )
        selected |= matches
    return selected


def _select_layers(candidates: list[str], layers: str | list[int]) -> list[int]:
    indices = sorted({layer for name in candidates if (layer := layer_of(name)) is not None})
    if layers == "all":
        return indices
    if isinstance(layers, str):
        last = re.fullmatch(r"last:([1-9]\d*)", layers)
        selected = list(range(indices[-1] + 1 - int(last[1]), indices[-1] + 1)) if last else []
    else:
        selected = layers
    if not selected or not set(selected) <= set(indices):
        expected = f"expected all, last:N, or a list of numbers from 0 to {indices[-1]}"
        raise UserError(
            f"model.layers is {layers!r}, but the base has {len(indices)} layers: {expected}.", "model.layers"
        )
    return selected


def inject(model: PreTrainedModel, config: peft.LoraConfig, source: str = "model.lora_options") -> peft.PeftModel:
    """Let PEFT put an adapter on the base, in fp32, and drawn from the seed alone, whatever was drawn before.

    On a base on the meta device the adapter is there too.
    """
    on_meta = model.device.type == "meta"
    device = torch.device("meta") if on_meta else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), device, calling_peft(model, config, source):
        torch.default_generator.manual_seed(torch.initial_seed())  # PEFT draws on the CPU
        adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=on_meta)
    for parameter in trainable_tensors(adapted).values():  # PEFT leaves whole modules and tokens in the base's dtype
        parameter.data = parameter.data.float()
    return adapted


@contextlib.contextmanager
def calling_peft(model: nn.Module, config: peft.LoraConfig, source: str) -> Iterator[None]:
    """Let PEFT put an adapter on packed experts too; its errors name the source, for it checks few options.

    Its warnings do not help users, or are about what is rejected here.
    """
    context = f"PEFT cannot put the adapter of {source} on the base"
    with warnings.catch_warnings(action="ignore"), adapting_experts(model, config), explaining(context, "adapter.peft"):
        yield


def trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every tensor that trains, by name: the adapter, and nothing of the base."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count trainable and all parameters; a packed 4-bit weight counts as its unpacked elements."""
    sizes = {parameter: parameter.numel() for parameter in model.parameters()}
    linears = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    sizes |= {linear.weight: linear.in_features * linear.out_features for linear in linears}
    return sum(size for parameter, size in sizes.items() if parameter.requires_grad), sum(sizes.values())


@contextlib.contextmanager
def with_adapter(model: Any, name: str | None) -> Iterator[None]:
    """Switch to another adapter, or to none; afterwards restore the adapter and which tensors train."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    active, was_enabled = model.active_adapter, not all(layer.disable_adapters for layer in layers)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if name is None:
            model.disable_adapter_layers()
        else:
            model.set_adapter(name)
            model.enable_adapter_layers()
        yield
    finally:
        if name is not None:
            model.set_adapter(active)
        (model.enable_adapter_layers if was_enabled else model.disable_adapter_layers)()
        for parameter, requires_grad in flags:  # PEFT's switches let all of an active adapter train
            parameter.requires_grad_(requires_grad)


def copy_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Set the trainable tensors to ``tensors``, which come from ``source``; if one does not fit, none is changed."""
    trainable = trainable_tensors(model)
    check_shapes(trainable, tensors, source)
    with torch.no_grad():
        for name, tensor in trainable.items():
            tensor.copy_(tensors[name])


def check_shapes(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor], source: str) -> None:
    """Reject tensors of ``source`` that have other names or shapes than the model's."""
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    actual = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    names = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
    if names:
        shapes = f"{actual.get(names[0], 'missing')} there, {expected.get(names[0], 'missing')} here"
        raise UserError(
            f"{source} does not fit the adapter of this model: {len(names)} tensors differ ({names[0]} is {shapes}). "
            "Use the base, rank, target_modules, layers and lora_options that it was trained with.",
            "adapter.shapes",
        )
