"""Bases of random weights: a tiny one of each family, and LLaMAs with a tokenizer of their own."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

START, END = "<|im_start|>", "<|im_end|>"
_TEMPLATE = (
    "{% for message in messages %}"
    f"{START}{{{{ message['role'] + '\\n' + message['content'] }}}}{END}{{{{ '\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{START}assistant{{{{ '\\n' }}}}{{% endif %}}"
)


def save_tokenizer(folder: Path, texts: Iterable[str], size: int = 8192) -> None:
    """Write a byte-level BPE tokenizer with a ChatML template, whose merges are learnt from some texts."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special: dict[str, Any] = {"special_tokens": [START, END], "initial_alphabet": alphabet}
    tokenizer.train_from_iterator(texts, BpeTrainer(vocab_size=size, show_progress=False, **special))
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


def save_family(folder: Path, model_type: str, tokenizer_of: Path, **settings: Any) -> Path:
    """Write a tiny random checkpoint of a type beside the tokenizer of another folder."""
    from tests.families import WRAPPERS, save_random, save_wrapper

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    tokenizer.save_pretrained(folder)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    save = save_wrapper if model_type in WRAPPERS else save_random
    made: Path = save(folder, model_type, **{**ids, **settings})
    return made
