"""Find the text model inside models that also read images or sound, by its class, and map its names to theirs."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from qlora_lightning.model.layers.select import attention_of
from qlora_lightning.model.model_types import check_type
from qlora_lightning.sources.folders import explaining_base, open_config, read_config
from qlora_lightning.support.errors import UserError

_LOGIT_KEYS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # in a text model's config
# Whole models of transformers 5.25 that scale or cap logits like their text models; others, such as gemma3, do not.
_CHANGE_LOGITS = (
    *("gemma3n", "gemma4", "gemma4_unified", "granite4_vision", "granite_docling", "hyperclovax_vision_v2", "inkling2"),
    *("mistral_large4", "muse_glimmer", "paligemma"),
)


def empty_model(config: Any, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> Any:
    """Build a config's model on the meta device, without kernels from a hub that the config may name."""
    options = {"attn_implementation": attention_of(config), "experts_implementation": None, "dtype": dtype}
    with torch.device("meta"), explaining_base(config.name_or_path, is_bounded=True):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)


def open_text_config(folder: Path, name: str, trust_remote_code: bool = False) -> Any:
    """Return transformers' config of the causal language model in a folder; messages use ``name``.

    For a wrapper, the config has two more attributes. ``wrapper`` is the type of the whole model. ``names_in_wrapper``
    maps prefixes of names in the text model to those in the whole model, such as ``{"model.":
    "model.language_model."}``.

    Raises:
        UserError: If there is none, because the type is different or a wrapper's text is not a model by itself.
    """
    stored = read_config(folder, name)
    has_code = trust_remote_code and "auto_map" in stored
    check_type(stored.get("model_type"), name, has_code)
    config = open_config(folder, trust_remote_code)
    if has_code or not is_wrapper(config):
        return config
    text = config.get_text_config(decoder=True)
    names = _names_in_wrapper(config, text) if text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None
    if names is None:
        raise UserError(
            f"Base {name}: the text model in a {config.model_type} is not a causal language model of transformers by "
            "itself. Choose another base.",
            "base.no_text",
        )
    check_type(text.model_type, name)
    changes_logits = any(getattr(text, key, None) not in (None, 1) for key in _LOGIT_KEYS)
    if changes_logits and config.model_type not in _CHANGE_LOGITS:
        raise UserError(
            f"Base {name}: a {text.model_type} scales or caps its logits, but the whole {config.model_type} does not. "
            "Choose another base.",
            "base.model_type",
        )
    text.wrapper, text.names_in_wrapper, text.name_or_path = config.model_type, names, config.name_or_path
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        in_text = {whole: own for own, whole in names.items()}
        skipped = [rename(name, in_text) for name in quantization.get("llm_int8_skip_modules") or ()]
        text.quantization_config = {**quantization, "llm_int8_skip_modules": skipped or None}
    return text


def is_wrapper(config: Any) -> bool:
    """Whether a type handles more than text; it may also be a causal language model that leaves out everything else."""
    is_plain = config.get_text_config(decoder=True) is config and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return config.model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES and not is_plain


def _whole_model(config: Any) -> Any:
    with torch.device("meta"), explaining_base(config.name_or_path, is_bounded=True):
        return AutoModelForMultimodalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)


def _names_in_wrapper(config: Any, text: Any) -> dict[str, str] | None:
    """Find the text model in the whole model by its class, or return ``None``; ``text`` gets the whole model's tie."""
    whole, alone = _whole_model(config), empty_model(text)
    decoder = _find(alone, alone.base_model)
    decoders = [name for name, module in whole.named_modules() if type(module) is type(alone.base_model)]
    head, head_in_whole = (_find(model, model.get_output_embeddings()) for model in (alone, whole))
    if not (decoder and len(decoders) == 1 and head and head_in_whole):
        return None
    text.tie_word_embeddings = f"{head_in_whole}.weight" in whole.all_tied_weights_keys
    return {f"{decoder}.": f"{decoders[0]}.", f"{head}.": f"{head_in_whole}."}


def _find(model: Any, module: Any) -> str | None:
    return next((name for name, each in model.named_modules() if each is module), None)


def rename(name: str, prefixes: Mapping[str, str]) -> str:
    """Return the name of a module or tensor with its prefix replaced, if it has one of these."""
    for before, after in prefixes.items():
        if f"{name}.".startswith(before):
            return f"{after}{name[len(before) :]}".removesuffix(".")
    return name


def names_in_text(folder: Path, text: Any, names: Iterable[str]) -> dict[str, str]:
    """Map the names of tensors in a folder's files to their names in its text model.

    A wrapper's tensors that are not part of its text model are left out. transformers' own renamings translate from the
    files to the whole model. It repeats its renamings within a text model when that model is loaded. ``text`` is the
    config that :func:`open_text_config` returns for the folder.
    """
    if not hasattr(text, "wrapper"):
        return {name: name for name in names}
    config, in_text = open_config(folder), {whole: own for own, whole in text.names_in_wrapper.items()}
    conversions = get_model_conversion_mapping(_whole_model(config), add_legacy=False)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming) and not each.scope_prefix]
    names_of_text = dict[str, str]()
    for name in names:
        whole_name = name
        for renaming in renamings:
            whole_name, _ = renaming.rename_source_key(whole_name)
        if whole_name.startswith((*in_text,)):
            names_of_text[name] = rename(whole_name, in_text)
    return names_of_text


def check_unique(names: Mapping[str, str], model: Any, source: Path) -> None:
    """Reject two tensors in a source's files for one weight of a meta model, because only one would be loaded.

    ``names`` comes from :func:`names_in_text`. Several tensors may be converted into one weight, such as for experts.
    """
    conversions, weights, first = get_model_conversion_mapping(model), model.state_dict(), dict[str, str]()
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    for stored_name, name in names.items():
        weight, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, weights)
        if pattern is None and weight in weights and (other := first.setdefault(weight, stored_name)) != stored_name:
            raise UserError(
                f"{source} has two tensors for one weight, {other} and {stored_name}: download or save the base again.",
                "base.tensors",
            )


def key_mapping(names: Mapping[str, str]) -> dict[str, str]:
    """Return the prefixes that differ between names in the files and in the text model, for ``from_pretrained``."""
    prefixes = dict[str, str]()
    for before, after in names.items():
        parts, new_parts = before.split("."), after.split(".")
        while parts and new_parts and parts[-1] == new_parts[-1]:
            del parts[-1], new_parts[-1]
        if parts:  # an empty prefix matches any name, and transformers adds it by itself
            prefixes[re.escape(".".join([*parts, ""]))] = ".".join([*new_parts, ""]).removeprefix(".")
    return {f"^{before}": after for before, after in prefixes.items()}
