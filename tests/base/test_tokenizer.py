import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from qlora_lightning.base import BaseFolder
from qlora_lightning.base.tokenizer import load_tokenizer
from qlora_lightning.support.errors import UserError


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*args: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", connect)


def test_text_survives_the_round_trip(smollm2: BaseFolder) -> None:
    tokenizer = load_tokenizer(str(smollm2.folder))
    text = "Grüße, 1234 world!\n\tif x:  # ≠"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_a_folder_with_nothing_but_a_tokenizer_will_do(smollm2: BaseFolder, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in smollm2.folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    assert len(load_tokenizer(str(folder))) == len(load_tokenizer(str(smollm2.folder)))


def test_a_folder_without_a_tokenizer_is_refused(model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"found no tokenizer in .*tiny-llama .*tokenizer\.json"):
        load_tokenizer(str(model_folder))


def test_a_damaged_tokenizer_is_refused_by_name(model_folder: Path) -> None:
    (model_folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"Tokenizer .*: the files in .*tiny-llama cannot be loaded"):
        load_tokenizer(str(model_folder))


def test_a_slow_tokenizer_is_refused(smollm2: BaseFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        is_fast = False

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **kwargs: Slow())
    with pytest.raises(UserError, match="expected a fast tokenizer, found Slow"):
        load_tokenizer(str(smollm2.folder))


def test_what_is_no_base_is_refused() -> None:
    with pytest.raises(UserError, match="'nothing': no such file or folder"):
        load_tokenizer("nothing")
