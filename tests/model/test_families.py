"""Types of transformers, in packed batches or a row at a time, compute what plain transformers and PEFT compute."""

import json
import random
import re
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM, BitsAndBytesConfig

from qlora_lightning import QLoRAModule, load_base
from qlora_lightning.cli import main
from qlora_lightning.model.activation_checkpointing import enable_activation_checkpointing
from qlora_lightning.model.layers.experts import ADAPTS_EXPERTS
from qlora_lightning.model.load.base_model import keep_quantized_layers
from qlora_lightning.model.load.wrapped import open_text_config
from qlora_lightning.model.model_types import PACKED_TYPES
from qlora_lightning.sources.tensors import tensor_names
from tests import families
from tests.adapters import load_by_card, make_run
from tests.equality import differences, same
from tests.errors import rejects
from tests.random_base import save_family
from tests.rows import change_json
from tests.steps import assert_same_step, distance, loss_and_gradients, make_batch, make_module

# each has something of its own: a window, fused linears, caps, tables of layers, scales, Conv1D, learned positions
QUICK = ("llama", "mistral", "phi3", "gemma3_text", "gemma4_text", "granite", "gpt2", "opt", "qwen3_5_text", "lfm2")
QUICK_WRAPPERS = ("gemma3", "qwen3_5")
QUICK += ("glm4_moe", "gpt_oss") if ADAPTS_EXPERTS else ("gpt_oss",)
DRAWING = ("llama", "mixtral", "minimax_m2", "opt")  # dropout of weights, noise before a router, layerdrop
ROW_BY_ROW = ("gemma2", "bloom", "modernbert-decoder", "minimax", "recurrent_gemma", "llama4_text")
TYPES = sorted({*PACKED_TYPES, *ROW_BY_ROW, *families.mixtures()})


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("model_type", [each if each in QUICK else slow(each) for each in TYPES])
def test_packed_or_a_row_at_a_time_it_is_rows_alone_by_plain_transformers_and_peft(model_type):
    assert not (model_type in PACKED_TYPES and model_type in ROW_BY_ROW)
    found = families.study(model_type)
    assert not families.differs(found), found


@pytest.mark.parametrize("model_type", ["gpt2", slow("gemma4_text"), slow("qwen3_5_text")])
def test_parts_are_found_by_structure_and_memory_is_planned(model_type, tmp_path, capsys):
    base, file = families.save_random(tmp_path / "base", model_type), tmp_path / "plan.json"
    options = ["--model.rank=2", "--model.compute_dtype=bf16", "--device-memory=4GiB", f"--json={file}"]
    options += ["--data.max_length=200", "--data.batch_size=8"]
    assert main(["plan", f"--model.base={base}", *options]) == 0
    assert re.search("4 layers, 64 wide.*what they keep is an estimate", capsys.readouterr().out, re.DOTALL)
    memory = json.loads(file.read_text())["memory"]
    kept = memory["parts"]["activations"] / memory["micro_batch_tokens"] / 4  # of a token, in a layer
    assert 64 * 2 * 4 < kept < 64 * 2 * 200  # a few dozen numbers as wide as the hidden state


@pytest.mark.parametrize(
    ("model_type", "options", "key", "fact"),
    [
        ("bert", {}, "base.model_type", "bert sees tokens that come after a token"),
        ("phimoe", {}, "base.model_type", "draws experts at random in training"),
        ("llama4_text", {}, "base.experts", "% of the layers' weights of a llama4_text"),
        ("mixtral", {"quantization": "int8"}, "model.quantization", "mixtral"),
        ("deepseek_v3", {"target_modules": "mlp", "dropout": 0.1}, "model.target_modules", "take no dropout"),
        ("llama", {"target_experts": True}, "model.target_experts", "a llama has no experts"),
        ("mixtral", {"target_experts": True, "dropout": 0.1}, "model.target_experts", "no dropout"),
    ],
)
def test_what_cannot_be_trained_as_asked_is_rejected_by_name(model_type, options, key, fact, tmp_path):
    families.save_random(tmp_path, model_type)
    with rejects(key, fact):
        QLoRAModule(str(tmp_path), **options).configure_model()


@pytest.mark.parametrize("model_type", [each if each in QUICK_WRAPPERS else slow(each) for each in families.WRAPPERS])
def test_the_text_of_a_wrapper_trains_and_its_adapter_is_plain_pefts_on_the_whole_model(model_type, tmp_path, cache):
    base, first, batch = families.save_wrapper(tmp_path / "base", model_type), tmp_path / "first", make_batch((23, 5))
    module = make_module(base, quantization="none")
    module.save_adapter(first)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        plain = families.plain_model(base, first, auto_class=AutoModelForMultimodalLM)
    assert families.error_of_tokens(module, plain, batch) <= 2e-5
    plain.save_pretrained(tmp_path / "plain")
    again = make_module(base, adapter=str(tmp_path / "plain"), quantization="none")
    again.save_adapter(tmp_path / "again")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("first", "again", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert same(load_file(files[0]), load_file(files[2]))
    steps = [loss_and_gradients(make_module(base), batch) for _ in range(2)]  # quantized, and from the cache
    assert torch.equal(steps[0][1], steps[1][1])


def test_each_adapter_on_a_wrapper_is_saved_with_its_own_modules(tmp_path):
    base = families.save_wrapper(tmp_path / "base", "gemma3")
    for name, targets in (("first", ["q_proj"]), ("second", ["q_proj", "down_proj"])):
        make_module(base, quantization="none", target_modules=targets).save_adapter(tmp_path / name)
    module = make_module(base, adapter=str(tmp_path / "first"), quantization="none")
    module.add_adapter("second", tmp_path / "second")
    module.save_adapter(tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()


class WithIA3(QLoRAModule):
    def build_model(self):
        base = load_base(self.base, quantization="none", compute_dtype=torch.float32).model
        return peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by PEFT 0.21 of transformers 5.24
def test_another_kind_of_adapter_on_a_wrapper_is_that_of_plain_peft_on_the_whole_model(tmp_path):
    base, batch = families.save_wrapper(tmp_path / "base", "gemma3"), make_batch((23, 5))
    module = make_module(base, cls=WithIA3)
    module.save_adapter(tmp_path / "adapter")
    plain = families.plain_model(base, tmp_path / "adapter", auto_class=AutoModelForMultimodalLM)
    assert families.error_of_tokens(module, plain, batch) <= 2e-5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by PEFT 0.21 of transformers 5.24
@pytest.mark.parametrize("model_type", [slow("gemma3"), slow("mistral3"), slow("qwen3_5_moe")])
def test_a_run_on_a_wrapper_is_merged_into_the_whole_model(model_type, tmp_path, tiny_base, capsys):
    base = save_family(tmp_path / "base", model_type, tiny_base)
    adapted = make_run(tmp_path / "run", base)
    merge = ["merge", "--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "merged"), "--dtype", "fp32"]
    assert main(merge) == 0
    assert "Checked on 8 validation rows" in capsys.readouterr().out
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "AutoModelForMultimodalLM" in card
    assert ("experts of this mixture were in nf4" in card) is (model_type == "qwen3_5_moe")
    plain, _ = load_by_card(tmp_path / "run" / "adapter")
    if model_type == "gemma3":
        ids = torch.arange(5, 30)[None]
        keep_quantized_layers(plain)  # bitsandbytes would compute in bf16
        with torch.no_grad():
            assert distance(plain(input_ids=ids).logits, adapted(input_ids=ids).logits) < 1e-4
    tensors, merged = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert tensors.keys() == merged.keys()
    copied = {name for name in tensors if torch.equal(tensors[name], merged[name])}
    assert {name for name in tensors if "vision" in name or "visual" in name} <= copied < tensors.keys()
    assert main([*merge, "--gguf", "f16", "--force"]) == 2


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        slow("gemma3", []),
        slow("qwen3_5_text", []),
        *([slow("glm4_moe", ["--model.target_experts=true"])] * ADAPTS_EXPERTS),
    ],
)
def test_wrappers_mixtures_and_recurrent_types_are_used_as_any_base(
    model_type, options, tmp_path, tiny_base, rows_file, capsys
):
    base = save_family(tmp_path / "base", model_type, tiny_base)
    options = [*options, f"--model.base={base}", f"--data.train={rows_file}", "--data.batch_size=2"]

    def run(name, steps, *more):
        more = [f"--trainer.default_root_dir={tmp_path / name}", f"--trainer.max_steps={steps}", *more]
        more += ["--model.schedule=constant", "--model.warmup=0", "--trainer.accelerator=cpu"]
        assert main(["fit", *options, "--trainer.enable_progress_bar=false", *more]) == 0

    run("whole", 3)
    is_wrapper = "Of a gemma3, only the text model is trained" in capsys.readouterr().out
    assert is_wrapper is (model_type == "gemma3")
    run("stopped", 1)
    run("stopped", 3, "--ckpt_path=last")
    assert not differences(tmp_path / "whole", tmp_path / "stopped")
    adapter = ["--adapter", str(tmp_path / "whole")]
    capsys.readouterr()
    assert main(["plan", *options, "--device-memory=4GiB"]) == 0
    names = {"self_attn.q_proj"}
    names |= {"mlp.experts.down_proj", "mlp.shared_experts.down_proj"} if model_type == "glm4_moe" else set()
    names |= {"linear_attn.in_proj_qkv"} if model_type == "qwen3_5_text" else set()
    assert names <= {*capsys.readouterr().out.split()}
    assert main(["evaluate", *adapter, f"--data.val={rows_file}", "--evaluation.rows=2"]) == 0
    assert main(["chat", *adapter, "--prompt", "Hi", "--max-new-tokens", "3"]) == 0


def test_a_wrapper_that_is_stored_in_4_bits_trains(tmp_path):
    base, stored = families.save_wrapper(tmp_path / "base", "gemma3"), tmp_path / "stored"
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(load_in_4bit=True, **options, llm_int8_skip_modules=["vision_tower", "lm_head"])
    AutoModelForMultimodalLM.from_pretrained(base, quantization_config=config).save_pretrained(stored)
    steps = [loss_and_gradients(make_module(folder, cache=False), make_batch((23, 5))) for folder in (base, stored)]
    assert_same_step(*steps)
    config.llm_int8_skip_modules.append("model.language_model.layers.0.mlp")
    AutoModelForMultimodalLM.from_pretrained(base, quantization_config=config).save_pretrained(stored)
    layers = make_module(stored, target_modules="attention").causal_lm.model.layers
    assert [type(layer.mlp.up_proj) is torch.nn.Linear for layer in layers] == [True] + [False] * (len(layers) - 1)


def test_a_wrapper_without_a_text_model_of_its_own_is_rejected(tmp_path):
    CONFIG_MAPPING["qwen3_vl"]().save_pretrained(tmp_path)
    with rejects("base.no_text", "qwen3_vl"):
        open_text_config(tmp_path, "a base")


# a callback of hypothesis at a garbage collection may get the interrupt first: it comes again after a second
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_wrapper_of_too_many_layers_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_lightning.support.errors.MOST_SECONDS", 1)
    families.save_wrapper(tmp_path, "gemma3")
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(config))
    with rejects("base.config", "config.json", "it takes more than 1 seconds"):
        open_text_config(tmp_path, "a base")


def test_a_wrapper_that_leaves_out_what_its_text_does_to_logits_is_rejected(tmp_path):
    families.save_wrapper(tmp_path, "gemma3")
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["final_logit_softcapping"] = 3.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with rejects("base.model_type", "caps its logits", "gemma3"):
        make_module(tmp_path)


def test_patterns_and_saved_modules_on_a_wrapper_are_those_of_plain_peft_on_the_whole_model(tmp_path):
    base, batch = families.save_wrapper(tmp_path / "base", "gemma3"), make_batch((23, 5))
    options = {"alpha_pattern": {r"layers\.0\.self_attn\.v_proj": 64}, "rank_pattern": {"down_proj": 2}}
    options |= {"modules_to_save": ["model.norm"], "trainable_token_indices": {"model.embed_tokens": [5, 6]}}
    module = make_module(base, quantization="none", lora_options=options)
    module.save_adapter(tmp_path / "ours")
    plain = families.plain_model(base, tmp_path / "ours", auto_class=AutoModelForMultimodalLM)
    assert families.error_of_tokens(module, plain, batch) <= 2e-5
    # PEFT's own folder, with the short names that it had matched in the whole model
    short = {"alpha_pattern": {"language_model.layers.0.self_attn.v_proj": 64}}
    short |= {"rank_pattern": {"language_model.*down_proj": 2}, "modules_to_save": ["language_model.norm"]}
    change_json(tmp_path / "ours" / "adapter_config.json", **short)
    again = make_module(base, adapter=str(tmp_path / "ours"), quantization="none")
    assert families.error_of_tokens(again, plain, batch) <= 2e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by PEFT 0.21 of transformers 5.24
def test_buffers_of_a_base_are_merged(tmp_path, tiny_base):
    base = save_family(tmp_path / "base", "glm4_moe", tiny_base)
    tensors = load_file(base / "model.safetensors")
    names = [name for name in tensors if name.endswith("e_score_correction_bias")]
    assert names
    for name in names:
        tensors[name] = torch.arange(len(tensors[name])) / 7
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    make_run(tmp_path / "run", base)
    assert main(["merge", "--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "merged"), "--rows", "0"]) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(tensors[name], merged[name]) for name in names)


PLAIN, EXPERTS = {"quantization": "none"}, {"target_experts": True}
WHOLE = [("mixtral", EXPERTS if ADAPTS_EXPERTS else {}), slow("gemma3_text", PLAIN), slow("gpt_oss", EXPERTS)]
WHOLE += [slow("lfm2", {}), slow("qwen3_5_moe_text", EXPERTS), slow("granitemoehybrid", {})]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "options"), WHOLE)
def test_a_whole_run_of_a_type_is_merged_and_checked(model_type, options, tmp_path, tiny_base, capsys):
    base = save_family(tmp_path / "base", model_type, tiny_base)
    make_run(tmp_path / "run", base, **options)
    merge = ["merge", "--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "merged"), "--dtype", "fp32"]
    assert main(merge) == 0
    assert "Checked on 8 validation rows" in capsys.readouterr().out
    if options != PLAIN:  # each is by itself again, as published
        names = [tensor_names(folder / "model.safetensors") for folder in (base, tmp_path / "merged")]
        assert names[0] == names[1]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("model_type", "rates", "reentrant"),
    [
        ("llama", {}, True),
        ("phi3", {}, None),
        ("opt", {"dropout": 0.1}, None),  # which OPT calls as a function
        ("opt", {"dropout": 0.1}, False),
        ("mixtral", {"router_jitter_noise": 0.1}, None),
        slow("minimax_m2", {"router_jitter_noise": 0.1}, None),
        slow("minimax", {"router_jitter_noise": 0.1}, None),  # a row at a time
    ],
)
def test_checkpointing_that_others_switch_on_changes_no_gradient(model_type, rates, reentrant, tmp_path):
    module = make_module(families.save_random(tmp_path, model_type, **rates), quantization="none")
    torch.manual_seed(1)
    _, gradients = loss_and_gradients(module, make_batch(families.LENGTHS))
    if reentrant is None:
        enable_activation_checkpointing(module.causal_lm)
    else:
        module.causal_lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    module.choose_layers()
    torch.manual_seed(1)
    assert distance(loss_and_gradients(module, make_batch(families.LENGTHS))[1], gradients) <= 1e-6


@pytest.mark.parametrize("model_type", [each if each in DRAWING else slow(each) for each in PACKED_TYPES])
def test_a_step_that_draws_random_numbers_computes_each_token_for_itself(model_type, tmp_path):
    settings = families.make_config(model_type).to_dict().items()
    rates = [name for name, value in settings if isinstance(value, float) and value == 0]  # each is switched on alone
    drawn, rates = [], [] if model_type == "diffllama" else rates  # which rejects its own
    for rate in (None, *rates):
        base = families.save_random(tmp_path / str(rate), model_type, **({} if rate is None else {rate: 0.1}))
        module, before = make_module(base, quantization="none"), [torch.get_rng_state(), random.getstate()]
        loss_and_gradients(module, make_batch(families.LENGTHS))
        draws = not torch.equal(torch.get_rng_state(), before[0]) or random.getstate() != before[1]
        drawn += [rate] * draws
        assert not (draws and module.cutter.skips_unlabelled), rate
        assert rate is not None or module.cutter.skips_unlabelled or "gpt" in model_type  # whose heads have others
    assert bool(drawn) is bool(rates)
    assert None not in drawn


def test_rows_beyond_a_table_of_positions_and_noise_beside_tables_of_layers_are_rejected(tmp_path):
    module = make_module(families.save_random(tmp_path / "gpt2", "gpt2"))
    with rejects("data.max_length", "256", "299"):  # the last token is only predicted
        module.compute_loss(make_batch((300,)))
    module = make_module(families.save_random(tmp_path / "gemma2", "gemma2"))
    with rejects("data.max_length", "4096"):
        module.compute_loss(make_batch((4100,)))
    module = make_module(families.save_random(tmp_path / "gemma", "gemma4_text"), neftune_alpha=5)
    with rejects("model.neftune_alpha"):
        module.compute_loss(make_batch((30,)))


def test_own_tensors_are_not_cut_and_a_batch_of_other_data_is_named(tiny_base, capsys):
    with rejects("data.batch", "input_ids, mask", "no labels"):
        make_module(tiny_base).compute_loss({"input_ids": torch.ones(1, 3), "mask": torch.ones(1, 3)})
    batch = make_batch() | {"row_ids": torch.arange(6), "source": torch.zeros(6)}
    module = make_module(tiny_base, micro_batch_tokens=1)
    assert len(module.cutter.cut(batch)) == 6
    assert len(module.cutter.cut(batch | {"scores": torch.rand(6)})) == 1
    assert "source, scores: tensors of your own are not cut" in capsys.readouterr().out
