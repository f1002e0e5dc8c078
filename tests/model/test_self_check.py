"""A device that computes something else than the libraries is found before it trains, and the plain path trains there.

A card is not here: its faults are planted on the CPU, where a fit does not check by itself.
"""

import copy
import json
import types

import pytest
import torch
from lightning import Trainer

from qlora_lightning import InstructionDataModule, QLoRAModule
from qlora_lightning.cli import main
from qlora_lightning.model import self_check
from qlora_lightning.model.checkpoint.resume import capture_generators
from qlora_lightning.model.layers import elementwise, lora
from qlora_lightning.model.self_check import find_faults
from tests.random_base import save_family
from tests.rows import counting_rows, write_rows
from tests.steps import fit, make_module


def wrong_rotary(rotate):
    return lambda query, key, cos, sin, sign: rotate(query, key, cos, sin, -sign)


def wrong_rotary_in_backward(rotate):
    return lambda query, key, cos, sin, sign: rotate(query, key, cos, sin, 1)


def scales_of_the_block_before(dequantize):
    def run(packed, quant_state):
        shifted = copy.copy(quant_state)
        shifted.absmax = quant_state.absmax.roll(1)
        return dequantize(packed, shifted)

    return run


def forgotten_residual(backward):
    return lambda grad, x, weight, inverse_rms, grad_residual=None: backward(grad, x, weight, inverse_rms)


FAULTS = {
    "rotary": (elementwise, "rotate", wrong_rotary),
    "rotary's backward": (elementwise, "rotate", wrong_rotary_in_backward),
    "scales": (lora, "dequantize", scales_of_the_block_before),
    "residual": (elementwise, "rms_norm_backward", forgotten_residual),
}


def plant(monkeypatch, fault):
    owner, name, make = FAULTS[fault]
    monkeypatch.setattr(owner, name, make(getattr(owner, name)))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_in_each_dtype(tiny_base, monkeypatch, fault, dtype):
    module = make_module(tiny_base, compute_dtype=dtype)
    plant(monkeypatch, fault)
    faults = find_faults(module.causal_lm, module.precision.dtype)
    assert {each.part for each in faults} == {"layer"}
    assert max(each.distance / each.limit for each in faults) > 2


def test_a_backward_that_is_5_percent_off_is_found_in_bf16(tiny_base, monkeypatch):
    module = make_module(tiny_base, compute_dtype="bf16")
    backward = elementwise.swiglu_backward

    def off(*arguments):
        hidden, *gradients = backward(*arguments)
        return hidden * 1.05, *gradients

    monkeypatch.setattr(elementwise, "swiglu_backward", off)
    assert find_faults(module.causal_lm, module.precision.dtype)


TRAINED_EMBEDDING = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
OPTIONS = [
    {},
    {"quantization": "none"},
    {"quantization": "int8"},
    {"layers": "last:1", "target_modules": ["down_proj"]},
    {"lora_options": {"use_dora": True}},
    {"dropout": 0.1},
    {"alpha": 512.0},
    {"lora_options": TRAINED_EMBEDDING},
]


@pytest.mark.parametrize("dtype", ["fp32", *(pytest.param(each, marks=pytest.mark.slow) for each in ("fp16", "bf16"))])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_healthy_device_has_no_fault(tiny_base, options, dtype):
    module = make_module(tiny_base, compute_dtype=dtype, **options)
    assert find_faults(module.causal_lm, module.precision.dtype) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "model_type", ["qwen3", "mistral", "gemma3_text", "gemma4_text", "phi3", "qwen3_moe", "gemma2"]
)
def test_neither_has_one_that_computes_another_family(tiny_base, tmp_path, model_type, dtype):
    module = make_module(save_family(tmp_path / "base", model_type, tiny_base), compute_dtype=dtype, cache=False)
    compared = self_check.compare_paths(module.causal_lm, module.precision.dtype)
    assert "layer" in {each.part for each in compared}
    assert [each for each in compared if not each.agrees] == []


def test_nothing_is_changed_by_it(tiny_base):
    module = make_module(
        tiny_base, dropout=0.1, lora_options={"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    )
    layer = module.causal_lm.base_model.layers[0]
    layer.self_attn.register_forward_hook(lambda *_: None)

    def state():
        tensors = {name: each.clone() for name, each in [*module.named_parameters(), *module.named_buffers()]}
        hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]
        modes = [(part.training, getattr(part, "fallback_reason", None)) for part in module.modules()]
        return tensors, hooks, modes, capture_generators()

    tensors, *rest = state()
    module.choose_layers()
    before = state()[1:]
    find_faults(module.causal_lm, torch.float32)
    tensors_after, *after = state()
    assert all(torch.equal(each, tensors_after[name]) for name, each in tensors.items())
    assert all(param.grad is None for param in module.parameters())
    assert after[:2] == list(before)[:2]
    assert torch.equal(after[2]["torch"], rest[2]["torch"])
    assert after[2]["python"] == rest[2]["python"]


# ---- in a fit -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checked(monkeypatch, cache):
    """A fit on the CPU checks it, with a cache of its own."""
    monkeypatch.setattr(self_check, "CHECKED_DEVICES", ("cpu",))


def train(base, folder, rows, **options):
    module = QLoRAModule(str(base), compute_dtype="fp32", rank=2, learning_rate=0.01, cache=False, **options)
    trainer = fit(module, folder, rows, max_steps=4)
    return module, float(trainer.callback_metrics["train_loss"])


def kinds(module):
    return {name: (type(part), type(part).__mro__) for name, part in module.model.named_modules()}


@pytest.mark.usefixtures("checked")
def test_a_fit_with_a_fault_warns_and_ends_where_one_without_does(tiny_base, rows_file, tmp_path, monkeypatch, capsys):
    healthy, right = train(tiny_base, tmp_path, rows_file)
    plain, _ = train(tiny_base, tmp_path, rows_file, fast=False)
    assert "computes something else" not in capsys.readouterr().out
    assert healthy.fast
    main(["cache", "clear", "--kind", "checks"])
    plant(monkeypatch, "rotary")
    checks, find = [], find_faults
    monkeypatch.setattr(self_check, "find_faults", lambda *model: checks.append(find(*model)) or checks[-1])
    for start, expected_checks in (("first", 1), ("second", 1), ("after cache clear", 2)):
        if start == "after cache clear":
            main(["cache", "clear", "--kind", "checks"])
        capsys.readouterr()
        module, loss = train(tiny_base, tmp_path, rows_file)
        printed = " ".join(capsys.readouterr().out.split())
        assert "computes something else than the libraries: layer output (" in printed
        assert "as with model.fast: false: slower, and right. Please open an issue" in printed
        assert loss == pytest.approx(right, rel=1e-5)
        assert (module.fast, module.precision) == (False, plain.precision)
        assert kinds(module) == kinds(plain)
        assert len(checks) == expected_checks


@pytest.mark.usefixtures("checked")
def test_if_only_kernels_disagree_torch_takes_their_place(tiny_base, rows_file, tmp_path, monkeypatch, capsys):
    names = ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rotate")
    kernels = types.SimpleNamespace(**{name: getattr(elementwise, name) for name in names})
    kernels.dequantize = lora.dequantize
    kernels.cross_entropy = self_check.loss.cross_entropy
    kernels.swiglu = lambda gate, up: gate * up
    distrusts = []
    monkeypatch.setattr(elementwise, "triton_kernels", lambda device_type: kernels)
    monkeypatch.setattr(elementwise, "distrust_kernels", lambda: distrusts.append(True))
    module, _ = train(tiny_base, tmp_path, rows_file)
    printed = " ".join(capsys.readouterr().out.split())
    assert "something else than the libraries: kernel swiglu 33×128 (" in printed
    assert "torch's operations take the place of Triton's kernels" in printed
    assert module.fast
    assert distrusts == [True]


@pytest.mark.usefixtures("checked")
def test_an_adapter_that_is_loaded_runs_plain_where_the_fused_path_has_a_fault(
    tiny_base, rows_file, tmp_path, monkeypatch, capsys
):
    module, _ = train(tiny_base, tmp_path, rows_file)
    module.save_adapter(tmp_path / "adapter")
    main(["cache", "clear", "--kind", "checks"])
    plant(monkeypatch, "rotary")
    opened = QLoRAModule.from_run(tmp_path / "adapter")
    assert not opened.fast
    evaluate = ["evaluate", f"--adapter={tmp_path / 'adapter'}", f"--data.val={rows_file}", "--rows=2"]
    assert main([*evaluate, "--data.batch_size=2"]) == 0
    validated = QLoRAModule(str(tiny_base), compute_dtype="fp32", adapter=tmp_path / "adapter", cache=False)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.validate(validated, InstructionDataModule(rows_file, val=rows_file, tokenizer=str(tiny_base)))
    assert not validated.fast
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("run, as with model.fast: false") == 3


@pytest.mark.usefixtures("checked")
def test_a_result_is_remembered_for_the_same_heads_alone(tiny_base, rows_file, tmp_path, monkeypatch):
    checked, compare = [], self_check.compare_paths
    monkeypatch.setattr(self_check, "compare_paths", lambda *given: checked.append(given) or compare(*given))
    counts = []
    for heads in (8, 8, 4):  # twice as wide, in linears of the same shapes
        sizes = {"num_attention_heads": heads, "num_key_value_heads": heads // 2}
        base = save_family(tmp_path / f"base-{heads}-{len(counts)}", "llama", tiny_base, **sizes)
        train(base, tmp_path, rows_file)
        counts.append(len(checked))
    assert counts == [1, 1, 2]


@pytest.mark.usefixtures("checked")
def test_out_of_memory_is_no_verdict(tiny_base, rows_file, tmp_path, monkeypatch, capsys):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(self_check, "compare_paths", run_out)
    module, _ = train(tiny_base, tmp_path, rows_file)
    assert module.fast
    printed = capsys.readouterr().out
    assert "something else" not in printed
    assert "not checked" not in printed
    main(["cache", "list", "--kind", "checks"])
    assert "nothing to list" in capsys.readouterr().out


def test_a_fit_on_a_cpu_does_not_check(tiny_base, rows_file, tmp_path, monkeypatch):
    monkeypatch.setattr(self_check, "compare_paths", None)
    train(tiny_base, tmp_path, rows_file)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [None, "residual"])
def test_the_command_prints_what_agrees(tiny_base, tmp_path, monkeypatch, capsys, fault):
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", counting_rows())
    if fault:
        plant(monkeypatch, fault)
    options = [f"--model.base={tiny_base}", f"--data.train={rows}", "--model.compute_dtype=fp32"]
    assert main(["plan", *options, "--check", "--json=plan.json"]) == (1 if fault else 0)
    check = json.loads((tmp_path / "plan.json").read_text())["check"]
    parts = {each["part"] for each in check["comparisons"]}
    assert parts == {"attention", "layer", "loss"}  # attention is in C++
    disagreeing = [each["part"] for each in check["comparisons"] if not each["agrees"]]
    assert set(disagreeing) == ({"layer"} if fault else set())
    assert ("disagrees" in capsys.readouterr().out) == bool(fault)
