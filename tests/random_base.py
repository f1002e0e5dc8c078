"""Bases of random weights: a tiny one of each family, and LLaMAs with a tokenizer of their own."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

START, END = "<|im_start|>", "<|im_end|>"
_TEMPLATE = (
    "{% for message in messages %}"
    f"{START}{{{{ message['role'] + '\\n' + message['content'] }}}}{END}{{{{ '\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{START}assistant{{{{ '\\n' }}}}{{% endif %}}"
)


def save_tokenizer(folder: Path, texts: Iterable[str], size: int = 8192) -> None:
    """Write a byte-level BPE tokenizer with a ChatML template, which knows the words of some texts.

    Args:
        folder: Where to.
        texts: What its merges are learnt from.
        size: Of its vocabulary, at the most.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        BpeTrainer(vocab_size=size, special_tokens=[START, END], initial_alphabet=alphabet, show_progress=False),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END)
    made.chat_template = _TEMPLATE
    made.save_pretrained(folder)


def save_random_llama(folder: Path, dtype: torch.dtype, **sizes: Any) -> None:
    """Write a random LLaMA beside its tokenizer: of two layers with 4 heads over 2, unless told otherwise."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = tokenizer.eos_token_id
    usual = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **ids, **(usual | sizes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(dtype)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)


WINDOW = 8
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
SETTINGS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": WINDOW, "head_dim": 16},
    "qwen2": {**_TWO_KINDS, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {**_TWO_KINDS, "use_sliding_window": True, "max_window_layers": 1, "head_dim": 16},
    "phi3": {"sliding_window": WINDOW, "partial_rotary_factor": 0.5, "pad_token_id": 0},
    "gemma": {"head_dim": 16},
    "gemma2": {
        **_TWO_KINDS,
        **{"head_dim": 16, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    },
    "gemma3_text": {**_TWO_KINDS, "head_dim": 16, "query_pre_attn_scalar": 11},
    "olmo3": _TWO_KINDS,
    "granite": {
        **{"logits_scaling": 1.7, "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.7}
    },
    "smollm3": {"no_rope_layers": [0, 1], "layer_types": ["full_attention"] * 2, "pad_token_id": 0},
    "glm4": {"head_dim": 16, "partial_rotary_factor": 0.5, "pad_token_id": 0},
    "exaone4": _TWO_KINDS,
    "seed_oss": {"head_dim": 16, "attention_dropout": 0.0, "residual_dropout": 0.0},
}


def save_family(folder: Path, model_type: str, tokenizer_of: Path, **settings: Any) -> Path:
    """Write a tiny random checkpoint of a family, in which norms and biases count too."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    ids = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(model_type, **{**sizes, **ids, **SETTINGS.get(model_type, {}), **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
            elif "embed" not in name:
                parameter.data.mul_(4)  # so that scores are far from even, and caps from linear
    model.save_pretrained(folder)
    return folder
