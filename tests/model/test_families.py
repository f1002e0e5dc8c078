"""Each family that is trained computes what plain transformers and PEFT compute, row by row."""

import itertools
import json
import shutil

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from qlora_lightning.base.folder import MODEL_TYPES
from qlora_lightning.cli import main
from qlora_lightning.model.adapters.lora import count_parameters, trainable_tensors
from qlora_lightning.model.layers.decoder_layer import FusedDecoderLayer
from qlora_lightning.model.layers.fuse import FUSED_TYPES
from qlora_lightning.model.load.build import meta_base
from qlora_lightning.support.versions import without_peft_warnings
from tests.adapters import make_run
from tests.random_base import save_family
from tests.steps import distance, loss_and_gradients, make_batch, make_module

LENGTHS = (23, 1, 12, 6)  # some longer than the sliding window, some not


@pytest.fixture(scope="session", params=MODEL_TYPES)
def family(request, tmp_path_factory, tiny_base):
    return save_family(tmp_path_factory.mktemp(request.param), request.param, tiny_base)


def plain_step(model):
    """Compute the mean loss of rows that come alone, and its gradients, by transformers and PEFT alone."""
    batch, loss = make_batch(LENGTHS), 0.0
    for start, end in itertools.pairwise(batch["cu_seqlens"].tolist()):
        ids = batch["input_ids"][:, start:end]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = loss + F.cross_entropy(logits, ids[0, 1:], reduction="sum")
    gradients = torch.autograd.grad(loss, list(trainable_tensors(model).values()))
    labelled = sum(LENGTHS) - len(LENGTHS)
    return float(loss.detach() / labelled), torch.cat([each.flatten() for each in gradients])


def test_losses_gradients_and_answers_are_those_of_plain_transformers(family, tmp_path):
    module = make_module(family, quantization="none")
    module.save_adapter(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32, attn_implementation="eager")
    assert count_parameters(meta_base(family, quantization="nf4")) == (0, base.num_parameters())  # what is planned
    with without_peft_warnings():
        plain = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    expected = plain_step(plain)
    for fast in (True, False):
        module.fast = fast
        found = loss_and_gradients(module, make_batch(LENGTHS))
        assert abs(found[0] - expected[0]) <= 2e-6 * expected[0]
        assert distance(found[1], expected[1]) <= 2e-6
    module.fast = True
    for layer in module.causal_lm.model.layers:
        fuses = isinstance(layer, FusedDecoderLayer) and layer.plain_reason is None
        assert fuses == (base.config.model_type in FUSED_TYPES)

    prompts = [list(range(5, 5 + length)) for length in (3, 20, 7)]
    with torch.no_grad():
        for prompt, answer in zip(prompts, module.answer(prompts, [], max_new_tokens=12), strict=True):
            logits = plain(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_a_llama_ignores_a_window_that_its_config_switches_off(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"sliding_window": 4, "use_sliding_window": False}
    (base / "config.json").write_text(json.dumps(config))
    module = make_module(base, quantization="none")
    _, gradients = loss_and_gradients(module, make_batch(LENGTHS))
    module.fast = False
    assert distance(gradients, loss_and_gradients(module, make_batch(LENGTHS))[1]) <= 2e-6


@pytest.mark.slow
def test_a_merged_model_is_base_and_adapter(family, tmp_path, capsys):
    make_run(tmp_path / "run", family, quantization="none")
    merge = ["merge", "--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "merged"), "--dtype", "fp32"]
    assert main(merge) == 0
    assert "Checked on 8 validation rows" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32)
    with torch.no_grad(), without_peft_warnings():
        ids = make_batch(LENGTHS)["input_ids"]
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
        assert distance(merged(input_ids=ids).logits, adapted(input_ids=ids).logits) <= 1e-5
