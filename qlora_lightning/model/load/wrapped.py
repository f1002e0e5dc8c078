"""The text of models that read images or sound too: found by its class in the whole model, whose names it knows."""

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

_LOGIT_KEYS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # of a text's config
# Whole models of transformers 5.25 that scale or cap logits as their texts do; others, such as gemma3, leave it out.
_CHANGE_LOGITS = (
    *("gemma3n", "gemma4", "gemma4_unified", "granite4_vision", "granite_docling", "hyperclovax_vision_v2", "inkling2"),
    *("mistral_large4", "muse_glimmer", "paligemma"),
)


def empty_model(config: Any, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> Any:
    """Build the model of a config on the meta device, with no kernels of a hub that the config may name."""
    options = {"attn_implementation": attention_of(config), "experts_implementation": None, "dtype": dtype}
    with torch.device("meta"), explaining_base(config.name_or_path, is_bounded=True):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)


def open_text_config(folder: Path, name: str, trust_remote_code: bool = False) -> Any:
    """Return transformers' config of the causal language model in a folder, which for messages has a name.

    That of a wrapper has two attributes more: ``wrapper``, the type of the whole model, and ``names_in_wrapper``, the
    prefixes of names in it by those in the text model, such as ``{"model.": "model.language_model."}``.

    Raises:
        UserError: There is none: the type is another, or the text of a wrapper is no model by itself.
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
            f"Base {name}: the text of a {config.model_type} is no causal language model of transformers by itself. "
            "Choose another base.",
            "base.no_text",
        )
    check_type(text.model_type, name)
    changes_logits = any(getattr(text, key, None) not in (None, 1) for key in _LOGIT_KEYS)
    if changes_logits and config.model_type not in _CHANGE_LOGITS:
        raise UserError(
            f"Base {name}: a {text.model_type} scales or caps its logits, which the whole {config.model_type} does not "
            "do. Choose another base.",
            "base.model_type",
        )
    text.wrapper, text.names_in_wrapper, text.name_or_path = config.model_type, names, config.name_or_path
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        in_text = {whole: own for own, whole in names.items()}
        skipped = [rename(name, in_text) for name in quantization.get("llm_int8_skip_modules") or ()]
        text.quantization_config = {**quantization, "llm_int8_skip_modules": skipped or None}
    return text


def is_wrapper(config: Any) -> bool:
    """Whether a type has more than text: it may be both this and a causal language model, which leaves all else out."""
    is_plain = config.get_text_config(decoder=True) is config and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return config.model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES and not is_plain


def _whole_model(config: Any) -> Any:
    with torch.device("meta"), explaining_base(config.name_or_path, is_bounded=True):
        return AutoModelForMultimodalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)


def _names_in_wrapper(config: Any, text: Any) -> dict[str, str] | None:
    """Find the text model in the whole one by its class; ``None`` if it is not there. ``text`` gets the whole's tie."""
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
    """Return the name of a module or tensor with another prefix, if it has one of these."""
    for before, after in prefixes.items():
        if f"{name}.".startswith(before):
            return f"{after}{name[len(before) :]}".removesuffix(".")
    return name


def names_in_text(folder: Path, text: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the names that tensors of a folder's files have in its text model, by those in the files.

    Tensors of a wrapper that are not of its text are left out. transformers' own renamings lead from the files to the
    whole model; what it renames within a text model, it renames again when that is loaded. ``text`` is what
    :func:`open_text_config` returns for the folder.
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
    """Reject two tensors of a source's files for one weight of a model on the meta device: only one would be loaded.

    ``names`` is what :func:`names_in_text` returns. Several tensors may be converted into one weight, as of experts.
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
    """Return the prefixes that differ between names of files and of the text, as ``from_pretrained`` takes them."""
    prefixes = dict[str, str]()
    for before, after in names.items():
        parts, new_parts = before.split("."), after.split(".")
        while parts and new_parts and parts[-1] == new_parts[-1]:
            del parts[-1], new_parts[-1]
        if parts:  # an empty prefix, which any name has, transformers adds by itself
            prefixes[re.escape(".".join([*parts, ""]))] = ".".join([*new_parts, ""]).removeprefix(".")
    return {f"^{before}": after for before, after in prefixes.items()}
