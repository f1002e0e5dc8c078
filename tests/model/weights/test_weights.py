"""A base's tensors, one at a time, are those of training; merged, they compute what base and adapter do."""

import json
import math
import shutil

import bitsandbytes as bnb
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from qlora_lightning.base import open_base
from qlora_lightning.model.adapters.targets import layer_of
from qlora_lightning.model.adapters.update_norms import measure_updates
from qlora_lightning.model.load.base_model import load_base
from qlora_lightning.model.load.build import meta_base
from qlora_lightning.model.weights.base import OriginalWeights, TrainedWeights, name_in_base
from qlora_lightning.model.weights.layerwise import Reference, run_layerwise
from qlora_lightning.model.weights.merging import MergedWeights, plan_merge
from qlora_lightning.support.errors import UserError
from tests.adapters import make_adapter
from tests.flat import collate

# ---- the weights of a base -------------------------------------------------------------------------------------------

LINEAR = "model.layers.1.mlp.down_proj"


def dense(module):
    """What a loaded layer multiplies with, in fp32."""
    if isinstance(module, bnb.nn.Linear4bit):
        module.weight.quant_state.dtype = torch.float32
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    if isinstance(module, bnb.nn.Linear8bitLt):
        return module.weight.data.float() * (module.weight.SCB.unsqueeze(1) / 127)
    return module.weight.float()


@pytest.mark.parametrize(
    ("quantization", "double_quant", "dtype", "cache"),
    [
        ("nf4", True, torch.bfloat16, True),
        ("nf4", True, torch.bfloat16, False),  # quantized again
        ("nf4", False, torch.float32, True),
        ("fp4", True, torch.float32, True),
        ("int8", True, torch.bfloat16, True),
        ("int8", True, torch.bfloat16, False),
        ("none", True, torch.bfloat16, True),
    ],
)
def test_weights_are_those_that_a_loaded_base_computes_with(
    tiny_base, tmp_path, monkeypatch, quantization, double_quant, dtype, cache
):
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path))
    options = {"quantization": quantization, "double_quant": double_quant, "compute_dtype": dtype}
    model = load_base(str(tiny_base), cache=cache, **options).model
    weights = TrainedWeights(open_base(str(tiny_base)), quantization, double_quant, dtype)
    own = weights(f"{LINEAR}.weight")
    assert own.dtype == torch.float32
    assert torch.equal(own, dense(model.get_submodule(LINEAR)))
    for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"):
        assert weights(name).dtype == dtype
        assert torch.equal(weights(name), model.get_parameter(name).data)
    assert torch.equal(weights("lm_head.weight"), model.get_output_embeddings().weight.data)  # tied
    if quantization != "none":
        original = OriginalWeights(open_base(str(tiny_base)))(f"{LINEAR}.weight")
        assert 0 < (own - original).norm() / original.norm() < 0.2


@pytest.mark.parametrize("settings", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_a_base_that_is_stored_quantized_gives_what_it_stores(tiny_base, tmp_path, settings):
    model = AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=BitsAndBytesConfig(**settings))
    model.save_pretrained(tmp_path / "stored")
    kind = "int8" if "load_in_8bit" in settings else "nf4"
    weights = TrainedWeights(open_base(str(tmp_path / "stored")), kind, False, torch.float32)
    assert torch.equal(weights(f"{LINEAR}.weight"), dense(model.get_submodule(LINEAR)))


# ---- merged ----------------------------------------------------------------------------------------------------------

IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
VARIANTS = {
    "plain": {},
    "rslora": {"lora_options": {"use_rslora": True}},
    "patterns": {"lora_options": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3.0}}},
    "dora": {"lora_options": {"use_dora": True}},
    "tokens": {"lora_options": {"trainable_token_indices": [5, 6]}},
    "norm": {"lora_options": {"modules_to_save": ["norm"]}},
    "embedding": {"lora_options": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}},
    "last_layer": {"layers": [1], "target_modules": "attention"},
    "untied": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def untied_base(tiny_base, tmp_path_factory):
    """The tiny base with a head of its own."""
    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("untied") / "base")
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(tiny_base, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def plain_logits(model):
    """The logits of the labelled tokens, by transformers' and PEFT's own forward, one row after the other."""
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([ids])).logits[0, :-1] for ids in IDS]
    return torch.cat([rows[0], rows[0], rows[1]])


def trained_weights(base):
    return TrainedWeights(open_base(str(base)), "nf4", True, torch.float32)


def assert_says(model, weights, expected):
    samples = [(ids, [-100, *ids[1:]], number) for number, ids in enumerate(IDS)]
    found = torch.cat(list(run_layerwise(model, weights, [collate(samples[0]), collate(*samples)])))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_say_what_base_and_adapter_say(tiny_base, untied_base, tmp_path, variant):
    base = untied_base if variant == "untied" else tiny_base
    model = make_adapter(tmp_path / "adapter", base, **VARIANTS[variant])
    expected = plain_logits(model)
    plan, weights = plan_merge(base, tmp_path / "adapter"), trained_weights(base)
    merged = MergedWeights(plan, weights)
    assert_says(plan.model.get_base_model(), weights, expected)  # base and adapter, filled layer by layer
    assert_says(meta_base(base), merged, expected)
    whole = AutoModelForCausalLM.from_pretrained(base)  # and in a whole model of transformers
    assert list(plan.shapes) == [name for name, _ in whole.named_parameters()]
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(merged(name))
    torch.testing.assert_close(plain_logits(whole.eval()), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (plain_logits(model) - expected).abs().max() > 0.01  # the adapter does something
    assert all(parameter.is_meta for name, parameter in plan.model.named_parameters() if "base_layer" in name)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"bias": "lora_only"}, "sets 'bias'"),
    ],
)
def test_kinds_that_are_not_verified_are_refused_by_name(tiny_base, tmp_path, settings, words):
    make_adapter(tmp_path / "adapter", tiny_base)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(UserError, match=f"cannot be merged: .*{words}"):
        plan_merge(tiny_base, tmp_path / "adapter")


def test_an_adapter_that_is_too_large_to_merge_is_refused(tiny_base, tmp_path):
    make_adapter(tmp_path / "adapter", tiny_base)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    huge = {name: torch.full_like(tensor, 1e30) for name, tensor in tensors.items() if "layers.0.mlp.up_proj" in name}
    save_file({**tensors, **huge}, file, {"format": "pt"})
    merged = MergedWeights(plan_merge(tiny_base, tmp_path / "adapter"), trained_weights(tiny_base))
    with pytest.raises(UserError, match=r"cannot be merged into model\.layers\.0\.mlp\.up_proj"):
        merged("model.layers.0.mlp.up_proj.weight")


# ---- how far an adapter moves its weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "options"),
    [
        ("nf4", {}),
        ("int8", {}),
        ("nf4", {"lora_options": {"use_dora": True}, "layers": [1]}),
        ("none", {"lora_options": {"use_rslora": True, "rank_pattern": {"q_proj": 2}}, "target_modules": "attention"}),
        ("none", {"lora_options": {"use_dora": True}, "target_modules": ["embed_tokens", "lm_head"]}),
    ],
    ids=str,
)
def test_each_update_is_measured_as_the_dense_difference_of_the_merged_weight(
    tiny_base, untied_base, tmp_path, quantization, options
):
    base = untied_base if "lm_head" in options.get("target_modules", ()) else tiny_base
    model = make_adapter(tmp_path / "adapter", base, quantization, **options)
    table = measure_updates(model)
    weights = TrainedWeights(open_base(str(base)), quantization, True, torch.float32)
    merged = MergedWeights(plan_merge(base, tmp_path / "adapter"), weights)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert sum(map(len, table.values())) == len(layers)
    for name, layer in layers.items():
        found = table[name.rpartition(".")[2]][layer_of(name)]
        weight = f"{name_in_base(name).removeprefix('base_model.model.')}.weight"
        before = weights(weight)
        assert found.ratio == pytest.approx(float((merged(weight) - before).norm() / before.norm()), rel=1e-4)
        shares = torch.linalg.svdvals(layer.get_delta_weight("default").detach().double())[: found.rank]
        shares /= shares.sum()
        assert found.effective_rank == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-4)
        assert found.rank == (2 if "rank_pattern" in str(options) and "q_proj" in name else 4)


def test_equal_directions_count_as_so_many_and_an_untrained_adapter_as_none(tiny_base, tmp_path):
    model = make_adapter(tmp_path / "adapter", tiny_base, target_modules=["q_proj"], layers=[1], std=0.0)
    found = measure_updates(model)["q_proj"][1]
    assert (found.ratio, found.rank, found.effective_rank) == (0.0, 4, 0.0)
    layer = next(each for each in model.modules() if isinstance(each, LoraLayer))
    a, b = layer.lora_A["default"].weight.data.zero_(), layer.lora_B["default"].weight.data
    a[0, 3] = a[1, 5] = b[7, 0] = b[9, 1] = 3.0
    assert measure_updates(model)["q_proj"][1].effective_rank == pytest.approx(2.0)


# ---- how far two models differ ---------------------------------------------------------------------------------------


def test_figures_are_those_computed_by_hand():
    even, skew = [0.0, 0.0], [math.log(3), 0.0]  # probabilities 1/2, 1/2 and 3/4, 1/4
    reference = Reference([torch.tensor([skew, even])], torch.tensor([0, 1]))
    assert reference.loss == pytest.approx((-math.log(3 / 4) - math.log(1 / 2)) / 2)
    found = reference.compare([torch.tensor([even, [0.0, math.log(3)]])])
    kl = [3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2), 1 / 2 * math.log(2 / 1) + 1 / 2 * math.log(2 / 3)]
    assert found._asdict() == pytest.approx(
        {
            "loss": (-math.log(1 / 2) - math.log(3 / 4)) / 2,
            "kl": sum(kl) / 2,
            "top1": 0.5,  # of equal logits the first counts as the top
        }
    )
    assert math.isnan(reference.compare([torch.tensor([[math.nan, 0.0], even])]).kl)
