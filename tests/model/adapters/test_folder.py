import json
import os
import socket
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qlora_lightning import QLoRAModule
from qlora_lightning.base.adapter_folder import read_identity
from qlora_lightning.base.cache import list_entries
from qlora_lightning.base.tokenizer import load_tokenizer
from qlora_lightning.model.adapters.folder import loading_snippet, save_adapter_folder
from qlora_lightning.model.adapters.lora import add_adapters, trainable_tensors
from qlora_lightning.model.base_model import load_base
from qlora_lightning.model.layers.fusing import fuse_layers

IDS = [5, 6, 7, 8, 9, 10]
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "qlora_lightning.json"}


def make(tiny_base, quantization="nf4", base_name=None, **settings):
    base = load_base(str(tiny_base), quantization=quantization, compute_dtype=torch.float32).model
    model = add_adapters(base, base_name=base_name or str(tiny_base), **settings)
    fuse_layers(model)
    with torch.no_grad():
        for tensor in trainable_tensors(model).values():
            tensor.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return model.eval()


def identity(tiny_base, quantization="nf4"):
    return {"base": str(tiny_base), "quantization": quantization, "double_quant": True, "compute_dtype": "float32"}


def save(folder, model, tiny_base, quantization="nf4", tokenizer=None, stop_ids=()):
    identity_of_base = identity(tiny_base, quantization)
    save_adapter_folder(folder, model, trainable_tensors(model), tokenizer, identity_of_base, stop_ids)
    return folder


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


PLAIN_PEFT = """
import sys, torch, warnings
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, adapter, place, ids = sys.argv[1], sys.argv[2], sys.argv[3], [int(token) for token in sys.argv[4:]]
settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=settings)
model = PeftModel.from_pretrained(model, adapter).train()  # no dropout; eval() may compute in bf16 on a CPU
with torch.no_grad():
    torch.save(model(input_ids=torch.tensor([ids])).logits, place)
assert "qlora_lightning" not in sys.modules
"""


def test_plain_peft_in_another_process_computes_the_same_logits(tiny_base, tmp_path):
    model = make(tiny_base)
    folder = save(tmp_path / "adapter", model, tiny_base)
    place = tmp_path / "logits"
    arguments = [str(tiny_base), str(folder), str(place), *map(str, IDS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", PLAIN_PEFT, *arguments], check=True, env=environment, capture_output=True)
    ours = logits(model)
    torch.testing.assert_close(torch.load(place, weights_only=True), ours, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (logits(model) - ours).abs().max() > 0.1  # the adapter does something


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_the_snippet_of_the_card_runs_and_computes_the_same_logits(tiny_base, tmp_path, quantization):
    model = make(tiny_base, quantization)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    folder = save(tmp_path, model, tiny_base, quantization, tokenizer)
    snippet = loading_snippet(folder, read_identity(folder))
    assert snippet.count("\n") == 2
    assert f"```python\n{snippet}\n```" in (folder / "README.md").read_text()
    names = {}
    exec(snippet, names)
    # in eval() bitsandbytes' layers on a CPU compute another function; without dropout, train() is what was trained
    torch.testing.assert_close(logits(names["model"].train()), logits(model), rtol=1e-4, atol=1e-4)
    assert names["tokenizer"].get_vocab() == tokenizer.get_vocab()


def test_the_folder_holds_weights_config_identity_card_and_tokenizer_with_its_template(tiny_base, tmp_path):
    model = make(tiny_base, rank=2, target_modules=["v_proj", "q_proj"], base_name="org/base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    save(tmp_path, model, tiny_base, tokenizer=tokenizer)
    assert contents(tmp_path).keys() >= FILES | {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4, ["q_proj", "v_proj"])
    assert config["inference_mode"]
    found = read_identity(tmp_path)
    assert found == {"format_version": 1, **identity(tiny_base)}


def test_the_generation_config_is_the_bases_with_every_stop_token_the_tokenizers_first(tiny_base, tmp_path):
    model = make(tiny_base)
    model.get_base_model().generation_config.update(eos_token_id=[7, 8], pad_token_id=None, do_sample=True, top_p=0.5)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.eos_token = "<|endoftext|>"
    save(tmp_path, model, tiny_base, tokenizer=tokenizer, stop_ids=[2, 7])
    wanted = {"eos_token_id": [0, 2, 7, 8], "bos_token_id": 1, "pad_token_id": 2, "do_sample": True, "top_p": 0.5}
    assert json.loads((tmp_path / "generation_config.json").read_text()) == wanted
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [0, 2, 7, 8]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_the_snippets_model_stops_where_the_bases_generation_config_would_not(tiny_base, tmp_path):
    model = make(tiny_base, "none")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)

    def generate(folder):
        names = {}
        exec(loading_snippet(folder, read_identity(folder)), names)
        prompt = torch.tensor([IDS])
        answer = names["model"].generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8)
        return answer[0, len(IDS) :].tolist()

    known = save(tmp_path / "known", model, tiny_base, "none", tokenizer)  # the base's config knows the tokenizer's end
    assert "GenerationConfig" not in loading_snippet(known, read_identity(known))
    found = read_identity(known)
    assert found == {"format_version": 1, **identity(tiny_base, "none")}
    endless = generate(known)
    assert len(endless) == 8

    stop = endless[3]
    lacking = save(tmp_path / "lacking", model, tiny_base, "none", tokenizer, [stop])
    snippet = loading_snippet(lacking, read_identity(lacking))
    assert snippet.count("\n") == 2
    assert f"```python\n{snippet}\n```" in (lacking / "README.md").read_text()
    assert generate(lacking) == endless[: endless.index(stop) + 1]


def test_weights_are_the_adapters_in_float32_under_pefts_names(tiny_base, tmp_path):
    model = make(tiny_base, target_modules=["q_proj"])
    save(tmp_path, model, tiny_base)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    own = trainable_tensors(model)
    assert weights.keys() == {name.replace(".default", "") for name in own}
    assert all(torch.equal(weights[name.replace(".default", "")], tensor) for name, tensor in own.items())
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_saving_twice_gives_the_same_bytes_and_leaves_nothing_beside(tiny_base, tmp_path):
    model = make(tiny_base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    first = contents(save(tmp_path / "adapter", model, tiny_base, tokenizer=tokenizer))
    assert contents(save(tmp_path / "adapter", model, tiny_base, tokenizer=tokenizer)) == first
    other = contents(save(tmp_path / "other", model, tiny_base, tokenizer=tokenizer))
    other.pop("README.md")  # its snippet names the folder
    assert other == {name: first[name] for name in other}


def test_saving_into_a_folder_replaces_the_earlier_adapter(tiny_base, tmp_path):
    model = make(tiny_base)
    before = contents(save(tmp_path, model, tiny_base))
    with torch.no_grad():
        next(iter(trainable_tensors(model).values())).add_(1.0)
    after = contents(save(tmp_path, model, tiny_base))
    assert {name for name in after if after[name] != before[name]} == {"adapter_model.safetensors"}


def test_what_a_killed_save_left_does_not_stop_the_next(tiny_base, tmp_path):
    (tmp_path / ".writing").mkdir()
    (tmp_path / ".writing" / "adapter_model.safetensors").write_bytes(b"half")
    save(tmp_path, make(tiny_base), tiny_base)
    assert contents(tmp_path).keys() == FILES
    assert load_file(tmp_path / "adapter_model.safetensors")


def test_saving_asks_no_network(tiny_base, tmp_path, monkeypatch):
    import huggingface_hub.constants

    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    model = make(tiny_base, base_name="org/base")  # a hub id: what PEFT would ask the hub about
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    save(tmp_path, model, tiny_base, tokenizer=tokenizer)


# PEFT 0.21 asks transformers 5.24 for an attribute by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_cached_base_and_the_folder_load_as_lm_evaluation_harness_loads_them(tiny_base, tmp_path, monkeypatch):
    """What its class HFLM does with `pretrained=…,peft=…,tokenizer=…,dtype=…` (lm-eval 0.4.13, checked by hand)."""
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    module = QLoRAModule(base=str(tiny_base), compute_dtype="fp32")
    module.configure_model()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    module.save_adapter(tmp_path / "adapter", load_tokenizer(str(tiny_base)))
    (entry,) = list_entries("quantized")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(entry.path, dtype=torch.float32)
    assert base.config.vocab_size == len(tokenizer)  # else it would resize the embedding
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"), revision="main").train()  # as above
    ids = torch.tensor([tokenizer("Count to 3.")["input_ids"]])
    with torch.no_grad():
        ours = module.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4)


def test_every_file_has_the_mode_of_the_umask(tiny_base, tmp_path):
    old = os.umask(0o027)
    try:
        save(tmp_path / "adapter", make(tiny_base), tiny_base)
    finally:
        os.umask(old)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / "adapter").iterdir()}
    assert modes == dict.fromkeys(FILES, "0o640")
