"""Put LoRA adapters on a frozen base with PEFT: choose their modules, and list the tensors that train."""

import contextlib
import copy
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import bitsandbytes as bnb
import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_lightning.model.adapters.names import keeping_targets, taken_for_experts
from qlora_lightning.model.layers.experts import PackedExperts, adapting_experts, expert_parameters, routers_of
from qlora_lightning.model.model_types import LINEARS, causal_lm_of, decoder_layers, layer_of
from qlora_lightning.support.errors import UserError, explaining
from qlora_lightning.support.values import check_setting, fits

_KEY = "model.lora_options"
ADAPTER = "default"  # PEFT's name for the adapter that a model is created with
# options of peft.LoraConfig, verified on a frozen, quantized base: the type of each, and its description in errors
OPTIONS: dict[str, tuple[Any, str]] = {
    "alpha_pattern": (dict[str, float] | None, "{name of modules: number}"),
    "ensure_weight_tying": (bool, "true or false"),
    # PEFT quantizes the base again for olora, and starts a plain adapter for eva and lora_ga; pissa, corda and loftq
    # need the unquantized weights
    "init_lora_weights": (
        bool | Literal["gaussian", "orthogonal"],
        "true, false, gaussian or orthogonal (others do not work on a quantized base)",
    ),
    "modules_to_save": (list[str] | None, "a list of names of modules"),
    "rank_pattern": (dict[str, int] | None, "{name of modules: whole number}"),
    "trainable_token_indices": (
        list[int] | dict[str, list[int]] | None,
        "a list of token ids, or {name of an embedding: list of token ids}",
    ),
    "use_dora": (bool, "true or false"),
    "use_rslora": (bool, "true or false"),
}
KEEPS_DTYPES = (
    "Trained tensors are float32, because small steps would be lost in 16 bits, and model.compute_dtype sets the dtype "
    "of products: do not cast the model (to, half, bfloat16, …)."
)
_MANY_NUMBERS = 10_000_000  # no head or projection has as many, and each checkpoint would grow by 40 MB
PRESETS = ("all-linear", "attention", "mlp")  # mlp is everything that is not attention
_BYPASSED = {  # linears whose weights these types read without the adapter: in a kernel, or when they are not quantized
    "out_proj": ("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"),
    "dt_proj": ("falcon_mamba", "jamba"),
}


def new_lora_config(
    base: PreTrainedModel,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | list[str] = "all-linear",
    layers: str | list[int] = "all",
    target_experts: bool = False,
    lora_options: dict[str, Any] | None = None,
) -> peft.LoraConfig:
    """Return PEFT's config for a new adapter: A ``(rank, in)`` and B ``(out, rank)`` on each target.

    PEFT computes ``W x + alpha / rank · B A x``, or with rsLoRA ``alpha / sqrt(rank)``. The arguments are those of
    :class:`~qlora_lightning.QLoRAModule`.
    """
    options = copy.deepcopy(lora_options or {})  # PEFT modifies the lists passed to it
    targets = resolve_targets(base, target_modules, layers)
    named = expert_parameters(base) if target_experts else []
    experts = [name for name in named if layer_of(name) in map(layer_of, targets)]
    if target_experts and not experts:
        raise UserError(
            f"model.target_experts is true, but a {base.config.model_type} has no experts that can carry adapters.",
            "model.target_experts",
        )
    _check_names(base, options, [*targets, *experts])
    return peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=targets,
        target_parameters=experts or None,
        **options,
    )


def check_options(options: Mapping[str, Any] | None) -> None:
    """Reject options that PEFT would ignore or apply wrongly on any base, and values of the wrong type."""
    check_setting(_KEY, options, isinstance(options, Mapping | None), f"{{name: value}}, of {', '.join(OPTIONS)}")
    for name, value in (options or {}).items():
        if name not in OPTIONS:
            raise UserError(f"model.lora_options sets {name}: expected one of {', '.join(OPTIONS)}.", _KEY)
        kind, expected = OPTIONS[name]
        if not fits(value, kind):
            raise UserError(f"model.lora_options.{name} is {value!r}: expected {expected}.", _KEY)


def _check_names(model: PreTrainedModel, options: Mapping[str, Any], targets: list[str]) -> None:
    """Reject options that name something this base does not have, because PEFT would silently ignore them."""
    for ending in options.get("modules_to_save") or ():
        if not any(name.endswith(ending) for name, _ in model.named_modules()):
            raise UserError(
                f"model.lora_options.modules_to_save names {ending}, which the base does not have.",
                _KEY,
            )
    indices = options.get("trainable_token_indices") or ()
    if options.get("trainable_token_indices") is not None and not indices:
        raise UserError("model.lora_options.trainable_token_indices is empty: name tokens, or leave it out.", _KEY)
    for index in itertools.chain(*indices.values()) if isinstance(indices, Mapping) else indices:
        vocabulary = model.get_input_embeddings().num_embeddings
        if not 0 <= index < vocabulary:
            raise UserError(
                f"model.lora_options.trainable_token_indices has {index!r}: expected token ids of the base, from 0 to "
                f"{vocabulary - 1:,}.",
                _KEY,
            )
    for pattern in (*(options.get("rank_pattern") or {}), *(options.get("alpha_pattern") or {})):
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):  # as PEFT does
            raise UserError(f"model.lora_options has a pattern for {pattern}, which has no adapter.", _KEY)


def resolve_targets(model: Any, target_modules: str | list[str], layers: str | list[int] = "all") -> list[str]:
    """Return the full name of every module to put an adapter on, in the model's order.

    Args:
        model: The base, without adapters.
        target_modules: ``all-linear`` (every linear of the decoder layers except routers), ``attention``, ``mlp``, a
            list of names (``q_proj``, or longer endings), or a regular expression that matches full names.
        layers: ``all``, ``last:N``, or a list of layer indices counted from 0.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (*LINEARS, nn.Embedding)) and not isinstance(module, PackedExperts)
    }
    candidates = [*modules]
    in_layers = {module for layer in decoder_layers(model) for module in layer.modules()} - routers_of(model)
    bypassed = tuple(f".{name}" for name, types in _BYPASSED.items() if model.config.model_type in types)
    names_in_layers = {name for name in candidates if modules[name] in in_layers and not name.endswith(bypassed)}
    selected = _select_by_name(candidates, names_in_layers, target_modules)
    chosen_layers = {None, *_select_layers(candidates, layers)}  # None: modules outside layers
    targets = [name for name in candidates if name in selected and layer_of(name) in chosen_layers]
    if not targets:
        raise UserError(
            f"model.target_modules {target_modules!r} has no modules in model.layers {layers!r}.", "model.layers"
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
            with contextlib.suppress(re.error):  # it may not be an expression: *proj
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
        selected = layers if isinstance(layers, list) else []
    if not selected or not set(selected) <= set(indices):
        expected = f"expected all, last:N, or a list of numbers from 0 to {indices[-1]}"
        raise UserError(
            f"model.layers is {layers!r}, but the base has {len(indices)} layers: {expected}.", "model.layers"
        )
    return selected


def inject(
    model: Any, config: peft.LoraConfig, source: str = "model.lora_options", name: str = ADAPTER
) -> peft.PeftModel:
    """Let PEFT put an adapter on a base, or another one on a PEFT model; errors name ``source``.

    The adapter is in fp32. It depends only on the seed, not on earlier random draws, and B is zero. If the base is on
    the meta device, so is the adapter. ``config.target_modules`` are names or ends of names.
    """
    base = causal_lm_of(model)
    config.target_modules = set(config.target_modules or ())
    full_names = config.target_modules & dict(base.named_modules()).keys()  # before PEFT, which shortens them
    _check_tied(base, config, source)
    _check_experts(base, config, source)
    device = torch.device("meta") if base.device.type == "meta" else contextlib.nullcontext()
    explained = explaining(f"PEFT cannot put the adapter of {source} on the base", "adapter.peft")
    # PEFT's warnings do not help users, or concern things that are rejected here
    with torch.random.fork_rng(devices=[]), device, warnings.catch_warnings(action="ignore"), explained:
        torch.default_generator.manual_seed(torch.initial_seed())  # PEFT draws on the CPU
        with adapting_experts(base, config), keeping_targets(base):
            if model is base:
                model = peft.get_peft_model(base, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
    for parameter in adapter_tensors(model, name).values():
        parameter.data = parameter.data.float()  # PEFT leaves whole modules and tokens in the base's dtype
        # PEFT lets tokens of a second adapter train
        parameter.requires_grad_(parameter.requires_grad and name == ADAPTER)
    for module in base.modules():
        is_table = isinstance(module, ModulesToSaveWrapper) and isinstance(module.original_module, nn.Embedding)
        if is_table and module is not base.get_input_embeddings():  # of positions; packed batches cast the embedding
            module.register_forward_hook(_cast_to_base)
    if missing := sorted(full_names - {*model.base_model.targeted_module_names}):
        raise UserError(
            f"PEFT puts no adapter on {missing[0]} ({source}): leave it out of model.target_modules or "
            "model.lora_options.modules_to_save.",
            "model.target_modules",
        )
    return cast(peft.PeftModel, model)


def _cast_to_base(module: Any, _: object, output: Tensor) -> Tensor:
    return output.to(module.original_module.weight.dtype)


def _check_experts(base: Any, config: peft.LoraConfig, source: str) -> None:
    """Reject options that PEFT's adapters of ``target_parameters`` do not support.

    Some linears are saved as such adapters too.
    """
    is_orthogonal = config.init_lora_weights == "orthogonal"
    options = {"dropout": config.lora_dropout, "use_dora": config.use_dora, "orthogonal start": is_orthogonal}
    unfit = [name for name, value in options.items() if value]
    key, remedy = "model.target_modules", "attention"
    if config.target_parameters:
        key, remedy = "model.target_experts", "false"
    if unfit and (config.target_parameters or taken_for_experts(base, config.target_modules)):
        raise UserError(
            f"PEFT's adapters on experts, and on MLPs next to the experts, take no {unfit[0]} ({source}): leave it "
            f"out, or set {key} to {remedy}.",
            key,
        )


def _check_tied(base: PreTrainedModel, config: peft.LoraConfig, source: str) -> None:
    """Reject an adapter that would train only the head or only the embedding of a base that ties them."""
    tied = {base.get_input_embeddings(), base.get_output_embeddings()}
    names = [name.rpartition(".")[2] for name, module in base.named_modules() if module in tied]
    saved = () if config.ensure_weight_tying else config.modules_to_save or ()
    untied = {*names} & {name.rpartition(".")[2] for name in (*(config.target_modules or ()), *saved)}
    if untied and getattr(base.config, "tie_word_embeddings", False):
        raise UserError(
            f"{source} trains {', '.join(sorted(untied))}, but this base ties head and embedding: training only one "
            f"unties them. Set model.lora_options to {{modules_to_save: [{names[0]}], ensure_weight_tying: true}}.",
            "base.tied",
        )


def trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every trainable tensor by name: the adapter, and nothing from the base."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_tensors(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return every tensor of a model's adapter, trainable or not; a tied tensor appears under each of its names."""
    return {
        key: parameter
        for key, parameter in model.named_parameters(remove_duplicate=False)
        if name in key.split(".")[-2:] or f".modules_to_save.{name}." in key
    }


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in a QLoRAModule's checkpoint, by name.

    From the model, these are the trainable tensors and the frozen ones of the adapter (such as A, drawn from a seed).
    """
    in_model = {
        name: parameter
        for name, parameter in module.named_parameters()
        if name.startswith("model.") and (parameter.requires_grad or ADAPTER in name.split("."))
    }
    return in_model | own_tensors(module)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a QLoRAModule subclass outside its model, by name: parameters (even frozen) and buffers.

    This leaves out tensors of :func:`frozen_models`, and tensors that also belong to the model.
    """
    tensors: dict[str, Any] = {**dict(module.named_parameters(recurse=False))}
    temporary = module._non_persistent_buffers_set
    tensors |= {name: buffer for name, buffer in module.named_buffers(recurse=False) if name not in temporary}
    for name, part in module.named_children():
        if name != "model":
            tensors |= part.state_dict(prefix=f"{name}.", keep_vars=True)
    model = getattr(module, "model", None)
    of_model = set() if model is None else {id(parameter) for parameter in model.parameters()}
    frozen = tuple(f"{name}." for name in frozen_models(module))
    return {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and id(tensor) not in of_model and not name.startswith(frozen)
    }


def frozen_models(module: nn.Module) -> list[str]:
    """Return the names of frozen models that a subclass has in addition to its own, such as a teacher.

    These are transformers models and modules of similar size. A class creates them again, like the base.
    """
    found = list[str]()
    for name, part in module.named_modules():
        if name.partition(".")[0] in ("", "model") or any(name.startswith(f"{each}.") for each in found):
            continue
        parameters = list(part.parameters())
        is_model = isinstance(part, PreTrainedModel) or sum(each.numel() for each in parameters) > _MANY_NUMBERS
        if is_model and not any(each.requires_grad for each in parameters):
            found.append(name)
    return found


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count trainable parameters and all parameters; a packed 4-bit weight counts as its unpacked elements."""
    sizes = {parameter: parameter.numel() for parameter in model.parameters()}
    linears = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    sizes |= {linear.weight: linear.in_features * linear.out_features for linear in linears}
    return sum(size for parameter, size in sizes.items() if parameter.requires_grad), sum(sizes.values())


@contextlib.contextmanager
def with_adapter(model: Any, name: str | None) -> Iterator[None]:
    """Switch to another adapter, or to none; afterwards, restore the adapter and which tensors train."""
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
        for parameter, requires_grad in flags:  # switching in PEFT makes all tensors of an active adapter trainable
            parameter.requires_grad_(requires_grad)


def copy_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Set the saved tensors to ``tensors``, which come from ``source``; if one does not fit, change none."""
    saved = saved_tensors(model)
    check_shapes(saved, tensors, source)
    with torch.no_grad():
        for name, tensor in saved.items():
            tensor.copy_(tensors[name])


def check_shapes(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor], source: str) -> None:
    """Reject tensors from ``source`` whose names or shapes differ from the model's."""
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
