"""LoRA adapters put on a frozen base, by PEFT: on which modules, and the tensors that train."""

import contextlib
import copy
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import bitsandbytes as bnb
import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_lightning.model.layers.experts import PackedExperts, adapting_experts, expert_parameters, routers_of
from qlora_lightning.model.model_types import LINEARS, decoder_layers, layer_of, linear_sizes
from qlora_lightning.support.errors import UserError, explaining

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
    if target_experts and (unfit := _unfit_for_parameters(dropout, lora_options or {})):
        raise UserError(
            f"model.target_experts is true, and adapters of experts take no {unfit}: leave that out, or set it to "
            "false.",
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
    targets = resolve_targets(model, target_modules, layers)
    named = expert_parameters(model) if target_experts else []
    experts = [name for name in named if layer_of(name) in map(layer_of, targets)]
    if target_experts and not experts:
        raise UserError(
            f"model.target_experts is true, and a {model.config.model_type} has no experts for adapters.",
            "model.target_experts",
        )
    linears = [module for module in map(model.get_submodule, targets) if isinstance(module, LINEARS)]
    if rank > (widest := max((max(linear_sizes(linear)) for linear in linears), default=rank)):
        raise UserError(
            f"model.rank is {rank:,}, and no module that would carry it is wider than {widest:,}.", "model.rank"
        )
    _check_options(model, options, [*targets, *experts])
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=targets,
        target_parameters=experts or None,
        **options,
    )
    adapted = inject(model, config)
    adapted_names = adapted.base_model.targeted_module_names
    if missing := [name for name in targets if name not in adapted_names]:
        raise UserError(
            f"model.target_modules has {missing[0]}, on which PEFT puts no adapter: leave it out there, or in "
            "model.lora_options.modules_to_save.",
            "model.target_modules",
        )
    return adapted


def taken_for_experts(model: nn.Module, targets: Collection[str]) -> list[str]:
    """Return the targets that PEFT, by their last names, takes for those of the experts beside them.

    It opens so the adapters of an older transformers, in which each expert had linears of these names. Those of the
    MLPs that a mixture has beside its experts are saved as ``target_parameters``, which it leaves where they are.
    """
    last_names = {name.rpartition(".")[2] for name in targets}
    taken = {last_name for last_name in last_names if _is_taken(model, last_name)}
    return [name for name in targets if name.rpartition(".")[2] in taken]


def _is_taken(model: nn.Module, module_name: str) -> bool:
    config = peft.LoraConfig(target_modules=[module_name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # it moves some names only together
        return True
    return module_name not in config.target_modules


def _unfit_for_parameters(dropout: float, options: Mapping[str, Any]) -> str:
    """Return the option that PEFT's adapters of ``target_parameters`` do not take; empty if there is none."""
    if dropout:
        return "dropout"
    if options.get("use_dora"):
        return "use_dora"
    return "orthogonal init_lora_weights" if options.get("init_lora_weights") == "orthogonal" else ""


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
    saved_modules, tokens = options.get("modules_to_save") or [], options.get("trainable_token_indices")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules() if module in (embedding, head)}
    for ending in (*saved_modules, *(tokens if isinstance(tokens, dict) else ())):
        if not any(name.endswith(ending) for name, _ in model.named_modules()):
            raise UserError(
                f"model.lora_options names {ending}, which the base does not have: expected the end of a name such as "
                f"{names[embedding]}.",
                "model.lora_options",
            )
    for pattern in (*(options.get("rank_pattern") or {}), *(options.get("alpha_pattern") or {})):
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):  # as PEFT does
            raise UserError(
                f"model.lora_options has a pattern for {pattern}, which carries no adapter.", "model.lora_options"
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


def inject(
    model: Any, config: peft.LoraConfig, source: str = "model.lora_options", name: str = ADAPTER
) -> peft.PeftModel:
    """Let PEFT put an adapter on a base, or one more on a model of PEFT; its errors name ``source``.

    It is in fp32, and drawn from the seed alone, whatever was drawn before. On a base on the meta device it is there
    too. ``config.target_modules`` are names, or ends of names.
    """
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    targets = set(config.target_modules or ())
    _check_tied(base, config, source)
    taken = taken_for_experts(base, targets)
    beside_experts = _linears_of(base, taken)
    if beside_experts and (unfit := _unfit_for_parameters(config.lora_dropout, vars(config))):
        raise UserError(
            f"PEFT's adapters of {beside_experts[0]} beside the experts of a {base.config.model_type} take no {unfit} "
            f"({source}): leave that out, or set model.target_modules to attention.",
            "model.target_modules",
        )
    targets -= {*taken}
    config.target_modules = targets if targets or config.target_parameters else DUMMY_TARGET_MODULES
    device = torch.device("meta") if base.device.type == "meta" else contextlib.nullcontext()
    explained = explaining(f"PEFT cannot put the adapter of {source} on the base", "adapter.peft")
    # PEFT's warnings do not help users, or are about what is rejected here
    with torch.random.fork_rng(devices=[]), device, warnings.catch_warnings(action="ignore"), explained:
        torch.default_generator.manual_seed(torch.initial_seed())  # PEFT draws on the CPU
        model = _inject_by_config(model, base, config, name)
        if beside_experts:
            _inject_by_tensors(model, base, config, name, beside_experts)
            config.target_modules = targets.union(beside_experts)
    _cast_and_freeze(model, base, name)
    return model


def _linears_of(base: nn.Module, targets: Collection[str]) -> list[str]:
    """Return the full names of a base's linears that targets select, which may be ends of names."""
    linears = [name.removesuffix(".base_layer") for name, module in base.named_modules() if isinstance(module, LINEARS)]
    return [name for name in linears if any(f".{name}".endswith(f".{target}") for target in targets)]


def _inject_by_config(model: Any, base: Any, config: peft.LoraConfig, name: str) -> peft.PeftModel:
    """Let PEFT find the modules and parameters that the config names."""
    with adapting_experts(base, config):
        if model is base:
            on_meta = base.device.type == "meta"
            return peft.get_peft_model(base, config, adapter_name=name, low_cpu_mem_usage=on_meta)
        model.add_adapter(name, config)
        return cast(peft.PeftModel, model)


def _inject_by_tensors(
    model: peft.PeftModel, base: Any, config: peft.LoraConfig, name: str, linears: Collection[str]
) -> None:
    """Put the adapter on linears, found by names of tensors: by those in a config PEFT would take them for experts."""
    without_targets = copy.copy(config)
    without_targets.target_modules, without_targets.target_parameters = {"of-tensors"}, None  # no module has this name
    model.peft_config[name] = without_targets
    tensors = dict.fromkeys(f"{each}.lora_A.weight" for each in linears)
    model.base_model.inject_adapter(base, name, low_cpu_mem_usage=base.device.type == "meta", state_dict=tensors)
    model.peft_config[name] = config


def _check_tied(base: PreTrainedModel, config: peft.LoraConfig, source: str) -> None:
    """Reject an adapter that would train head or embedding alone, of a base that ties them."""
    tied = {base.get_input_embeddings(), base.get_output_embeddings()}
    names = [name.rpartition(".")[2] for name, module in base.named_modules() if module in tied]
    saved = () if config.ensure_weight_tying else config.modules_to_save or ()
    untied = {*names} & {name.rpartition(".")[2] for name in (*(config.target_modules or ()), *saved)}
    if untied and getattr(base.config, "tie_word_embeddings", False):
        raise UserError(
            f"{source} trains {', '.join(sorted(untied))}, and this base ties head and embedding: to train one alone "
            f"would part them. Set model.lora_options to {{modules_to_save: [{names[0]}], ensure_weight_tying: true}}.",
            "base.tied",
        )


def _cast_and_freeze(model: nn.Module, base: Any, name: str) -> None:
    """Cast an adapter to float32, and freeze it if it is not the model's own.

    PEFT leaves whole modules and tokens in the base's dtype, and lets tokens of a second adapter train.
    """
    for parameter in adapter_tensors(model, name).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(parameter.requires_grad and name == ADAPTER)
    for module in base.modules():
        is_table = isinstance(module, ModulesToSaveWrapper) and isinstance(module.original_module, nn.Embedding)
        if is_table and module is not base.get_input_embeddings():  # of positions; packed batches cast the embedding
            module.register_forward_hook(_cast_to_base)


def _cast_to_base(module: Any, _: object, output: Tensor) -> Tensor:
    return output.to(module.original_module.weight.dtype)


def trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every tensor that trains, by name: the adapter, and nothing of the base."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_tensors(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return every tensor of one of a model's adapters, whether it trains or not; a tied one by each of its names."""
    return {
        key: parameter
        for key, parameter in model.named_parameters(remove_duplicate=False)
        if name in key.split(".")[-2:] or f".modules_to_save.{name}." in key
    }


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint of a QLoRAModule holds, by name.

    It is what trains, what of the adapter is frozen (such as A, drawn from a seed), and buffers of a subclass.
    """
    adapter = {name: p for name, p in module.named_parameters() if p.requires_grad or ADAPTER in name.split(".")}
    return adapter | {name: buffer for name, buffer in module.named_buffers() if not name.startswith("model.")}


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
    """Set the saved tensors to ``tensors``, which come from ``source``; if one does not fit, none is changed."""
    saved = saved_tensors(model)
    check_shapes(saved, tensors, source)
    with torch.no_grad():
        for name, tensor in saved.items():
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
