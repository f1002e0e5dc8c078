"""The parts of a decoder, found by its structure; and which of transformers' types run in packed batches."""

from typing import Any, cast

from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from qlora_lightning.support.errors import UserError

# Proven by `python -m tests.families` with transformers 5.24 and 5.25: states, losses, gradients, answers, folders and
# merges of packed batches are those of rows alone. All other types run a row at a time, by transformers' own forward.
PACKED_TYPES: tuple[str, ...] = (
    *("apertus", "apertus1p5_text", "arcee", "aria_text", "axk1", "biogpt", "bitnet", "codegen", "cohere", "cohere2"),
    *("cohere2_moe", "ctrl", "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "dots1", "ernie4_5", "ernie4_5_moe"),
    *("exaone", "exaone4", "exaone_moe", "flex_olmo", "flint", "gemma", "gemma3_text", "gemma4_text", "glm", "glm4"),
    *("glm4_moe", "glm4_moe_lite", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite"),
    *("granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense"),
    *("hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe", "kolibri1", "lara_mini"),
    *("llama", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral"),
    *("nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3"),
    *("qwen3_moe", "sarvam_mla", "sarvam_moe", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "youtu"),
)
# Proven by it too: their mixers, which have a state, compute samples by themselves (layers/mixer.py). Others with a
# state run a row at a time: the lightning attention of minimax has no convolution to find it by, the mixer of
# recurrent_gemma reads positions, and that of zaya is inside an attention.
RECURRENT_TYPES: tuple[str, ...] = (
    *("bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lara_mini", "lfm2"),
    *("lfm2_moe", "lfm3", "mamba2", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
)
PACKED_TYPES += RECURRENT_TYPES
# Found by it too, and rejected.
_NOT_CAUSAL = (
    *("bert", "bert-generation", "big_bird", "camembert", "cpmant", "data2vec-text", "electra", "ernie"),
    *("megatron-bert", "prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm"),
    *("xlm-roberta", "xlm-roberta-xl", "xlnet"),
)
REJECTED_TYPES = {
    **dict.fromkeys(_NOT_CAUSAL, "sees tokens that come after a token"),
    "laguna": "has adapters of which plain PEFT would lose some",
    "mamba": "reads weights past adapters, and past 4 bits (falcon_mamba and mamba2 do not)",
    "phimoe": "draws experts at random in training",
    "rwkv": "rescales its weights in place, which 4-bit ones do not take",
}
# With SDPA these give another result than with transformers' own attention, which is used instead.
EAGER_TYPES: tuple[str, ...] = ("falcon",)
# Of a config's layer_types; the second line is of those with mixers, and of MLPs and attention beside them.
_PACKED_LAYERS = {"full_attention", "sliding_attention"}
_PACKED_LAYERS |= {"linear_attention", "conv", "mamba", "hybrid", "attention", "mlp", "moe"}
LINEARS = (nn.Linear, Conv1D)  # Conv1D is GPT-2's name for a linear whose weight is transposed


def runs_packed(config: Any) -> bool:
    """Whether a model computes a packed batch, its samples in one stream, as it would compute each alone."""
    if getattr(config, "has_own_code", False):  # set where a base is loaded
        return False
    return config.model_type in PACKED_TYPES and set(getattr(config, "layer_types", None) or ()) <= _PACKED_LAYERS


def check_type(model_type: str | None, name: str, has_code: bool = False) -> None:
    """Reject what is no causal language model of transformers, nor a whole model that may have one inside.

    ``has_code`` says that a base brings its own code.
    """
    reason = REJECTED_TYPES.get(str(model_type))
    is_trained = has_code or model_type in {
        **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }
    if model_type in CONFIG_MAPPING_NAMES and not is_trained:
        reason = "is no causal language model"
    if reason:
        raise UserError(f"Base {name}: a {model_type} {reason}. Choose another base.", "base.model_type")
    if not is_trained:
        raise UserError(
            f"Base {name}: its model_type is {model_type!r}, which this version of transformers does not know. Update "
            "transformers, or choose another base.",
            "base.model_type",
        )


def causal_lm_of(model: Any) -> Any:
    """Return the model of transformers inside PEFT's wrapper; a model without one is itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(causal_lm: Any) -> list[Any]:
    """Return the decoder layers: the largest module list of the config's length, and all of the same layer class."""
    stacks: list[Any] = [module for module in causal_lm.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not stacks:
        raise UserError(f"A {causal_lm.config.model_type} has no decoder layers that can be told apart.", "base.layers")
    candidates = [stack for stack in stacks if len(stack) == getattr(causal_lm.config, "num_hidden_layers", None)]
    largest = max(candidates or stacks, key=lambda stack: sum(weight.numel() for weight in stack.parameters()))
    return [layer for stack in stacks if type(stack[0]) is type(largest[0]) for layer in stack]


def layer_of(name: str) -> int | None:
    """Return the index of the decoder layer that a module is in, by its full name; ``None`` for one outside."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def linear_sizes(linear: nn.Module) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear, or of GPT-2's Conv1D."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return cast(Any, linear).in_features, cast(Any, linear).out_features
