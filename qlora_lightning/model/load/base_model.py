"""Load the frozen base, and quantize it once."""

import contextlib
import functools
import gc
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import bitsandbytes as bnb
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from qlora_lightning.model.layers import experts
from qlora_lightning.model.layers.select import attention_of
from qlora_lightning.model.load.wrapped import check_unique, empty_model, key_mapping, names_in_text, open_text_config
from qlora_lightning.sources import folders
from qlora_lightning.sources.cache import Json, cached_folder
from qlora_lightning.sources.tensors import check_loaded, save_model
from qlora_lightning.support.console import quiet_loggers
from qlora_lightning.support.errors import UserError, is_out_of_memory, reason_of
from qlora_lightning.support.settings import check_arguments

Quantization = Literal["nf4", "fp4", "int8", "none"]

_log = logging.getLogger(__name__)


class LoadedBase(NamedTuple):
    """A frozen base, its folder, and its identity for adapter folders and checkpoints."""

    model: PreTrainedModel
    source: folders.BaseFolder
    identity: dict[str, Any]


def load_base(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    cache: bool = True,
    device: torch.device | str = "cpu",
) -> LoadedBase:
    """Load a frozen base onto ``device``, with quantized linears and everything else in ``compute_dtype``.

    The other arguments are those of :class:`~qlora_lightning.QLoRAModule`. For ``double_quant``, see Dettmers et al.
    2023, section 3.
    """
    check_arguments("model", load_base, {"quantization": quantization})
    source = folders.open_base(name, revision, weights=False)
    config = open_text_config(source.folder, name, trust_remote_code)  # rejects a type that cannot be trained
    stored = folders.read_config(source.folder, name).get("quantization_config")
    double_quant = check_quantization(stored, quantization, double_quant, name)
    source = folders.open_base(name, source.revision)  # now the weights
    folder, bnb_config = source.folder, None
    try:
        if stored is None and quantization != "none":
            if cache:
                folder = quantized_folder(source, quantization, double_quant, compute_dtype, device, trust_remote_code)
            else:
                bnb_config = _bitsandbytes_config(quantization, double_quant, compute_dtype)
        model = _load(folder, bnb_config, compute_dtype, device, trust_remote_code)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"Out of memory on {device} while {name} was loaded: {reason_of(error)}. Stop other programs that use "
            f"{device}, or set a smaller model.base, model.quantization: nf4 or trainer.strategy: ddp_sharded_offload.",
            "base.memory",
        ) from error
    with folders.explaining_base(folder):  # for a base that is not quantized as it claims
        for module in model.modules():
            if stored is not None and isinstance(module, bnb.nn.Linear4bit):  # transformers keeps the stored dtype
                module.compute_dtype = module.weight.quant_state.dtype = compute_dtype
    keep_quantized_layers(model.requires_grad_(False))
    check_widths(model)
    identity = {
        "base": name,
        "revision": source.revision,
        "fingerprint": folders.fingerprint(source.folder),
        "quantization": quantization,
        "double_quant": double_quant,
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "license": folders.read_license(source.folder),
    }
    if (stored_as := folders.stored_format(source.folder)) is not None:
        identity["stored_as"] = stored_as
    if hasattr(config, "wrapper"):
        identity["wrapper"] = config.wrapper
        for key in folders.WRAPPER_KEYS:  # those of a cached text model are not read from its file
            setattr(model.config, key, getattr(config, key))
    vars(model)["loaded_identity"] = identity  # for a custom build_model
    model.name_or_path = str(source.folder) if source.revision is None else source.name  # PEFT stores it in its config
    return LoadedBase(model, source, identity)


def quantized_folder(
    source: folders.BaseFolder,
    quantization: Quantization,
    double_quant: bool,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> Path:
    """Return the cache folder of a quantized base; if it does not exist, quantize the base on ``device``.

    A GPU writes the same layout as a CPU.
    """
    config = folders.read_config(source.folder, source.name)
    bnb_config = _bitsandbytes_config(quantization, double_quant, dtype)
    irrelevant = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}  # no effect on the model

    def build(folder: Path) -> None:
        _log.info("Quantizing %s, once; later starts read it from the cache.", source.name)
        model = _load(source.folder, bnb_config, dtype, device, trust_remote_code)
        keep_quantized_layers(model.requires_grad_(False))  # else packed weights would be saved incorrectly
        with _quiet_bars():
            # shards are small because each is in memory while it is written; packed experts and a text model by itself
            # do not keep the published names
            is_published = not experts.experts_of(model) and not hasattr(model.config, "wrapper")
            save_model(model, folder, max_shard_size="200MB", save_original_format=is_published)
        del model
        # a bitsandbytes linear and its weight refer to each other: without a collection, this model would stay on the
        # device along with the one loaded from the folder
        gc.collect()
        torch.cuda.empty_cache()

    key: dict[str, Json] = {
        # format 1 did not compare the base's tensors with its config; in format 2, a text model had other names
        "format": 3 if "text_config" in config else 2,
        "source": folders.fingerprint(source.folder),
        "config": {name: value for name, value in config.items() if name not in irrelevant},
        "settings": bnb_config.to_diff_dict(),
        "dtype": str(dtype),
        "bitsandbytes": bnb.__version__,
        "transformers": transformers.__version__,
    }
    if (layout := folders.open_fp8(source.folder)) is not None:
        key["fp8"] = str(layout)
    return cached_folder("quantized", key, build, label=f"{source.name} {quantization}")


def _load(
    folder: Path,
    bnb_config: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Load a folder with transformers; with ``bnb_config``, it also quantizes the linears, which takes minutes."""
    config = open_text_config(folder, str(folder), trust_remote_code)
    stored = _read_names(folder, config)
    if bnb_config is None and any(name.endswith("experts.down_proj_blocks") for name in stored.shapes):
        raise UserError(
            f"The experts of {folder} are stored in MXFP4: set model.quantization to nf4 or fp4.", "model.quantization"
        )
    described: PreTrainedModel | None = None
    if bnb_config is not None or stored.files.fp8 is not None or not trust_remote_code:
        described = _describe(folder, config, stored, trust_remote_code)
        if bnb_config is not None:
            bnb_config = _choose_quantizer(bnb_config, described, folder)
    experts.register_experts()  # a cached base may contain packed experts
    if stored.files.fp8 is None:
        loader: Any = AutoModelForCausalLM
        weights: dict[str, Any] = {"pretrained_model_name_or_path": folder, "use_safetensors": True}
    else:
        loader, weights = type(described), _dequantized_weights(folder, stored.files, dtype, device)
    bars = _quiet_bars() if bnb_config is None else contextlib.nullcontext()
    with bars, quiet_loggers(logging.ERROR, "transformers"), folders.explaining_base(folder):
        model, report = loader.from_pretrained(
            **weights,
            config=config,
            key_mapping=key_mapping(stored.names),
            dtype=dtype,
            device_map={"": torch.device(device)},
            attn_implementation=attention_of(config),
            experts_implementation=None,
            use_kernels=False,  # transformers 5.25 fetches layer code from the hub by default
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else the error does not name the tensors
            **({} if bnb_config is None else {"quantization_config": bnb_config}),
        )
    _check_report(report, model, described, stored, folder, is_quantized_now=bnb_config is not None)
    if trust_remote_code and not type(model).__module__.startswith("transformers."):
        model.config.has_own_code = True
        model.set_attn_implementation("sdpa")
    return cast(PreTrainedModel, model)


class _StoredTensors(NamedTuple):
    """The tensors in a base's files that its text model reads."""

    files: folders.TensorFiles
    names: dict[str, str]  # names in the text model, by the name in the files
    shapes: dict[str, tuple[int, ...]]  # by the name in the text model
    left_out: set[str]  # names in the files of tensors that the whole model reads for things other than text


def _read_names(folder: Path, config: Any) -> _StoredTensors:
    """Read the names and shapes of a base's tensors, without their numbers."""
    files = folders.TensorFiles(folder)
    shapes = files.shapes()
    names = names_in_text(folder, config, shapes)
    of_text = {name: shapes[stored_name] for stored_name, name in names.items()}
    return _StoredTensors(files, names, of_text, shapes.keys() - names.keys())


def _describe(folder: Path, config: Any, stored: _StoredTensors, trust_remote_code: bool) -> PreTrainedModel:
    """Return a config's model on the meta device, where a base's own code may not run.

    Raises:
        UserError: If it has far more weights than the files, since memory would be allocated for the missing ones, or
            if two tensors in the files are for one weight.
    """
    described = empty_model(config, trust_remote_code=trust_remote_code)
    n_described, n_stored = sum(map(torch.numel, described.parameters())), sum(map(math.prod, stored.shapes.values()))
    if n_described > 2 * n_stored:  # packed weights count twice
        raise UserError(
            f"{folder / 'config.json'} describes {n_described:,} weights, but the files next to it hold "
            f"{n_stored:,}: download or save the base again.",
            "base.size",
        )
    check_unique(stored.names, described, folder)
    return described


def _choose_quantizer(settings: BitsAndBytesConfig, described: PreTrainedModel, folder: Path) -> BitsAndBytesConfig:
    """Return the quantizer's settings; if the model has experts, those of a quantizer that packs them too."""
    experts.check_experts(described, "int8" if settings.load_in_8bit else "nf4", str(folder))
    if experts.experts_of(described):
        return experts.ExpertsConfig(**settings.to_diff_dict())
    return settings


def _dequantized_weights(
    folder: Path, files: folders.TensorFiles, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Any]:
    """Return the ``from_pretrained`` arguments that read a base in FP8, one weight at a time.

    Only the class of a model accepts them. ``AutoModelForCausalLM`` does not.
    """
    state_dict = {name: _DequantizedOnRead(files, name, dtype, device) for name in files}
    weights: dict[str, Any] = {"pretrained_model_name_or_path": None, "state_dict": state_dict}
    if (folder / "generation_config.json").is_file():
        weights["generation_config"] = GenerationConfig.from_pretrained(folder)
    return weights


def _check_report(
    report: dict[str, Any],
    model: Any,
    described: PreTrainedModel | None,
    stored: _StoredTensors,
    folder: Path,
    is_quantized_now: bool,
) -> None:
    """Check that each tensor in the files was read into one of its shape, and that each model tensor was filled."""
    report["unexpected_keys"] -= stored.left_out
    if described is not None:
        if is_quantized_now:  # transformers does not check the shapes of weights that it quantizes
            shapes, sizes = stored.shapes, {name: each.shape for name, each in described.named_parameters()}
            report["mismatched_keys"] |= {
                (name,) for name in sizes.keys() & shapes.keys() if sizes[name] != shapes[name]
            }
        tied = described.all_tied_weights_keys.keys()
        report["unexpected_keys"] |= tied - model.all_tied_weights_keys.keys()  # a head that is not the embedding
    check_loaded(report, folder, stored.shapes)


class _DequantizedOnRead:
    """A tensor of a base in FP8, read when transformers slices it, as it slices tensors of safetensors files.

    transformers' own FP8 quantizer cannot run along with bitsandbytes', and rounds scales to the base's dtype.
    """

    def __init__(self, files: folders.TensorFiles, name: str, dtype: torch.dtype, device: torch.device | str) -> None:
        self._read = functools.partial(files.read, name, dtype, device)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._read()[index]


def _bitsandbytes_config(quantization: Quantization, double_quant: bool, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


@contextlib.contextmanager
def _quiet_bars() -> Iterator[None]:
    bars = transformers.utils.logging
    was_enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            bars.enable_progress_bar()


def check_widths(model: nn.Module) -> None:
    """Reject 4-bit linears that bitsandbytes dequantizes incorrectly on this CPU.

    On CPUs with AVX-512, bitsandbytes 0.50 does so for rows of, for example, 96 weights. That is a multiple of its
    vectors of 16 weights, but not of its blocks of 64 weights with one scale.
    """
    for name, module in model.named_modules():
        if type(module) is not bnb.nn.Linear4bit or module.weight.device.type != "cpu":
            continue
        if not _is_restored(module.in_features, module.weight.quant_type):
            raise UserError(
                f"bitsandbytes gives wrong results on this CPU for 4-bit rows of {module.in_features} weights, as in "
                f"{name}: set model.quantization to int8 or none, or use a GPU.",
                "base.width",
            )


@functools.cache
def _is_restored(width: int, quant_type: str) -> bool:
    """Whether dequantizing restores weights that have one value per block, which 4 bits hold exactly."""
    weight = (torch.arange(64 * width) // 64 + 1.0).view(64, width)
    packed, quant_state = bnb.functional.quantize_4bit(weight, quant_type=quant_type)
    return torch.equal(bnb.functional.dequantize_4bit(packed, quant_state), weight)


def stored_quantization(settings: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the quantization in a base's ``quantization_config``, and whether the scales are quantized too."""
    names = [settings.get(key) for key in ("quant_method", "quant_algo", "format")]  # such as modelopt, NVFP4
    kind = f"{' '.join(str(name) for name in names if name) or 'unknown'} (not by bitsandbytes)"
    if settings.get("load_in_8bit"):
        kind = "int8"
    elif settings.get("load_in_4bit"):
        kind = str(settings.get("bnb_4bit_quant_type", "fp4"))
    return kind, bool(settings.get("bnb_4bit_use_double_quant", False))


def check_quantization(
    stored: Mapping[str, Any] | None, quantization: Quantization, double_quant: bool, name: str
) -> bool:
    """Return whether scales are quantized; ``stored``, the base's ``quantization_config``, decides if present.

    Raises:
        UserError: If the base is stored with another quantization.
    """
    if stored is None:
        return double_quant
    kind, double_quant = stored_quantization(stored)
    if kind != quantization:
        remedy = f"set model.quantization to {kind}, or use a base in 16 bits"
        if kind not in get_args(Quantization):
            remedy = "use the same model in FP8, with one scale per tensor, row or block, or in 16 bits"
        raise UserError(
            f"model.base {name} is stored quantized as {kind}, but model.quantization is {quantization}: {remedy}.",
            "model.quantization",
        )
    return double_quant


def keep_quantized_layers(model: nn.Module) -> None:
    """Keep bitsandbytes from changing layers in ``eval()``.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit weight in place at the first evaluation forward. After
    that, frozen layers pass no gradient and ``state_dict()`` corrupts the weight. On a CPU, its int8 layers also
    compute a different function in ``eval()`` than in ``train()``, so they stay in training mode.
    """
    for module in model.modules():
        layer: Any = module
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            layer.train()
            layer.train = functools.partial(_keep_training_mode, layer)  # for this layer only


def _keep_training_mode(layer: nn.Module, mode: bool = True) -> nn.Module:
    """Stand in for ``layer.train``, which the model's ``eval()`` calls too."""
    return layer
