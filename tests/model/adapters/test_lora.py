import pytest
import torch

from qlora_lightning.model.adapters.folder import save_adapter_folder
from qlora_lightning.model.adapters.lora import add_adapters, copy_tensors, load_adapters, trainable_tensors
from qlora_lightning.model.base_model import load_base
from qlora_lightning.support.errors import UserError

IN_PLUS_OUT = {
    "q": 64 + 64,
    "k": 64 + 32,
    "v": 64 + 32,
    "o": 64 + 64,
    "gate": 64 + 128,
    "up": 64 + 128,
    "down": 128 + 64,
}
ATTENTION = sum(IN_PLUS_OUT[name] for name in "qkvo")


def make(tiny_base, quantization="nf4", **settings):
    return add_adapters(load_base(str(tiny_base), quantization=quantization).model, **settings)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 2 * 8 * sum(IN_PLUS_OUT.values())),  # layers × rank × (in + out)
        ({"rank": 3}, 2 * 3 * sum(IN_PLUS_OUT.values())),
        ({"rank": 4, "target_modules": "attention"}, 2 * 4 * ATTENTION),
        ({"rank": 4, "target_modules": "attention", "layers": [1]}, 4 * ATTENTION),
        (
            {"rank": 2, "target_modules": ["q_proj"], "lora_options": {"use_dora": True}},
            2 * (2 * IN_PLUS_OUT["q"] + 64),
        ),
    ],
)
def test_as_many_parameters_train_as_the_formula_says(tiny_base, settings, count):
    tensors = trainable_tensors(make(tiny_base, **settings))
    assert sum(tensor.numel() for tensor in tensors.values()) == count


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_adapters_are_float32_over_a_bfloat16_base_that_stays_frozen(tiny_base, quantization):
    model = make(tiny_base, quantization)
    tensors = trainable_tensors(model)
    assert len(tensors) == 2 * 7 * 2  # layers × linears × (A, B)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
    assert torch.float32 not in {p.dtype for p in model.parameters() if not p.requires_grad}


def test_b_starts_at_zero_so_that_the_model_is_the_base(tiny_base):
    base = load_base(str(tiny_base)).model
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        model = add_adapters(base).eval()
        assert torch.equal(model(input_ids=ids).logits, before)
    for name, tensor in trainable_tensors(model).items():
        assert bool(tensor.any()) == (".lora_A." in name)


def draw_adapter(tiny_base, seed, draws_between):
    torch.manual_seed(seed)
    torch.rand(draws_between)
    return trainable_tensors(make(tiny_base))


def test_a_is_drawn_from_the_seed_alone(tiny_base):
    first, again, other = (draw_adapter(tiny_base, *choice) for choice in ((7, 0), (7, 5), (8, 0)))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in first.items() if ".lora_A." in name)


def test_making_adapters_leaves_the_generator_where_it_was(tiny_base):
    base = load_base(str(tiny_base)).model
    torch.manual_seed(7)
    torch.rand(3)
    before = torch.get_rng_state()
    add_adapters(base)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("settings", "scaling"), [({}, 2.0), ({"rank": 4}, 2.0), ({"rank": 4, "alpha": 20}, 5.0)])
def test_the_update_is_scaled_by_alpha_over_rank_and_alpha_is_twice_the_rank(tiny_base, settings, scaling):
    layer = make(tiny_base, **settings).get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == scaling


def test_the_config_names_base_and_short_targets(tiny_base):
    config = make(tiny_base, target_modules="attention", base_name="org/base").peft_config["default"]
    assert config.base_model_name_or_path == "org/base"
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 0}, "model.rank is 0: expected a positive integer"),
        ({"dropout": 1.0}, r"model.dropout is 1.0: expected a probability in \[0, 1\)"),
        ({"dropout": -0.1}, "model.dropout is -0.1"),
        ({"alpha": -16.0}, r"model.alpha is -16.0, expected a positive number up to 1,000,000, such as 16\."),
        ({"alpha": float("nan"), "rank": 4}, r"model.alpha is NaN, .* such as 8\."),
        ({"target_modules": ["q_prj"]}, "Did you mean 'q_proj'"),
        ({"layers": "last:3"}, "the base has 2 layers"),
        ({"lora_options": {"r": 3}}, "set model.rank"),
    ],
)
def test_values_that_cannot_work_are_refused(tiny_base, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        make(tiny_base, **settings)


def test_the_users_options_are_not_changed(tiny_base):
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    make(tiny_base, lora_options=options)
    assert options == {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}


def numbered(model):
    return {
        name: torch.full_like(tensor, number) for number, (name, tensor) in enumerate(trainable_tensors(model).items())
    }


def test_copied_tensors_are_there(tiny_base):
    model = make(tiny_base, rank=2)
    values = numbered(model)
    copy_tensors(model, values, "The checkpoint")
    assert all(torch.equal(tensor, values[name]) for name, tensor in trainable_tensors(model).items())
    assert all(tensor.requires_grad for tensor in trainable_tensors(model).values())


def test_a_missing_a_foreign_and_a_misshaped_tensor_are_refused_and_nothing_is_copied(tiny_base):
    model = make(tiny_base, rank=2)
    before = {name: tensor.detach().clone() for name, tensor in trainable_tensors(model).items()}
    values = numbered(model)
    name = next(name for name in values if "layers.1.mlp.down_proj.lora_B" in name)
    lacking = {key: value for key, value in values.items() if key != name}
    with pytest.raises(UserError, match=r"1 tensors are missing and 0 are foreign .*down_proj.lora_B"):
        copy_tensors(model, lacking, "The checkpoint")
    with pytest.raises(UserError, match=r"The file does not fit.*0 tensors are missing and 1 are foreign \(other"):
        copy_tensors(model, {**values, "other": torch.zeros(1)}, "The file")
    with pytest.raises(UserError, match=r"down_proj.lora_B.* has shape \(64, 5\) there and \(64, 2\) here.*model.rank"):
        copy_tensors(model, {**values, name: torch.zeros(64, 5)}, "The checkpoint")
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainable_tensors(model).items())


def test_a_loaded_adapter_goes_on_training_with_its_own_rank_and_values(tiny_base, tmp_path):
    model = make(tiny_base, rank=3, target_modules=["q_proj"], alpha=12)
    copy_tensors(model, numbered(model), "The test")
    identity = {"base": str(tiny_base), "quantization": "nf4"}
    save_adapter_folder(tmp_path, model, trainable_tensors(model), None, identity)

    again = load_adapters(load_base(str(tiny_base)).model, str(tmp_path))
    tensors = trainable_tensors(again)
    assert tensors.keys() == trainable_tensors(model).keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in trainable_tensors(model).items())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert again.get_base_model().model.layers[0].self_attn.q_proj.scaling["default"] == 4.0
