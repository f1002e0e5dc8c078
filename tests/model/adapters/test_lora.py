"""What trains: adapters as the options ask, in fp32, drawn from the seed alone."""

import copy

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lightning.model.adapters.folder import save_adapter_folder
from qlora_lightning.model.adapters.lora import (
    add_adapters,
    copy_tensors,
    trainable_tensors,
)
from qlora_lightning.model.base_model import load_base
from qlora_lightning.model.layers.fusing import fuse_layers
from qlora_lightning.model.layout import whole_samples
from qlora_lightning.model.loss import head_loss
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.versions import without_peft_warnings

ATTENTION = 2 * (64 + 64) + 2 * (64 + 32)  # in + out of q and o, of k and v
ALL = ATTENTION + 3 * (64 + 128)
IDS = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def untied_base(tmp_path_factory):
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("untied")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, tie_word_embeddings=False, **sizes)).save_pretrained(folder)
    return folder


def make(folder, quantization="nf4", dtype=torch.float32, **settings):
    base = load_base(str(folder), quantization=quantization, compute_dtype=dtype).model
    return add_adapters(base, base_name=str(folder), **settings)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 2 * 8 * ALL),  # layers × rank × (in + out)
        ({"rank": 4, "target_modules": "attention", "layers": [1]}, 4 * ATTENTION),
        ({"rank": 2, "target_modules": ["q_proj"], "lora_options": {"use_dora": True}}, 2 * (2 * (64 + 64) + 64)),
    ],
)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_so_many_parameters_train_in_float32_over_a_frozen_bfloat16_base(tiny_base, quantization, settings, count):
    model = make(tiny_base, quantization, torch.bfloat16, **settings)
    tensors = trainable_tensors(model)
    assert sum(tensor.numel() for tensor in tensors.values()) == count
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(".lora_" in name for name in tensors)
    assert torch.float32 not in {p.dtype for p in model.parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"rank": 4}, 2.0),  # alpha is twice the rank
        ({"rank": 4, "alpha": 20}, 5.0),
        ({"rank": 4, "alpha": 6, "lora_options": {"use_rslora": True}}, 3.0),  # 6 / sqrt(4)
        ({"alpha": 2, "lora_options": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 12}}}, 4.0),
    ],
)
def test_the_update_is_scaled_by_alpha_over_rank(tiny_base, settings, scaling):
    layer = make(tiny_base, target_modules=["q_proj"], **settings).get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == scaling


def test_a_is_drawn_from_the_seed_alone_and_the_generator_stays_where_it_was(tiny_base):
    def draw(seed, draws_before):
        torch.manual_seed(seed)
        torch.rand(draws_before)
        state = torch.get_rng_state()
        tensors = trainable_tensors(make(tiny_base))
        assert torch.equal(torch.get_rng_state(), state)
        return tensors

    first, again, other = draw(7, 0), draw(7, 5), draw(8, 0)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in first.items() if ".lora_A." in name)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 0}, "model.rank is 0: expected a positive integer"),
        ({"dropout": 1.0}, r"model.dropout is 1.0: expected a probability in \[0, 1\)"),
        ({"dropout": -0.1}, "model.dropout is -0.1"),
        ({"alpha": -16.0}, r"model.alpha is -16.0: expected a positive number, such as 16\."),
        ({"alpha": float("nan"), "rank": 4}, "model.alpha is nan"),
        ({"target_modules": ["lm_head"]}, "selects lm_head, but this base ties head and embedding"),
        *(
            ({"lora_options": options}, sentence)
            for options, sentence in (
                ({"r": 8}, "sets 'r', which has a key of its own: set model.rank"),
                ({"use_dorra": True}, "'use_dorra': expected one of .*Did you mean 'use_dora'"),
                ({"loftq_config": {}}, "'loftq_config': expected one of .*use_rslora"),
                ({"init_lora_weights": "eva"}, "'eva': expected one of True, False, gaussian, orthogonal"),
                ({"modules_to_save": ["embedding"]}, "names 'embedding', but the base has no such module"),
                ({"modules_to_save": ["lm_head"]}, "ties head and embedding.*Add `ensure_weight_tying: true`"),
            )
        ),
    ],
)
def test_what_cannot_work_is_refused(tiny_base, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        make(tiny_base, **settings)


# ---- what trains beside, by PEFT's own layers ------------------------------------------------------------------------


def backward(model):
    """One forward and backward as the module's compute_loss does them."""
    causal_lm = model.get_base_model()
    samples, positions = whole_samples([IDS.shape[1]]), torch.arange(IDS.shape[1])[None]
    hidden = causal_lm.base_model(input_ids=IDS, position_ids=positions, samples=samples, use_cache=False)
    loss = head_loss(hidden.last_hidden_state[0, :-1], IDS[0, 1:], causal_lm.get_output_embeddings()).nll_sum
    loss.backward()
    return loss.item()


def train(model):
    """Three steps, after which every trainable tensor has moved."""
    fuse_layers(model)
    optimizer = torch.optim.AdamW(trainable_tensors(model.train()).values(), lr=1e-2, weight_decay=0.0)
    before = {name: tensor.detach().clone() for name, tensor in trainable_tensors(model).items()}
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(backward(model))
        optimizer.step()
    assert losses[2] < losses[0]
    assert all(not torch.equal(tensor, before[name]) for name, tensor in trainable_tensors(model).items())
    return model


TIED = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
BESIDE = [
    ("tiny_base", "nf4", {"use_dora": True}),
    ("tiny_base", "nf4", {"trainable_token_indices": [5, 6]}),
    ("tiny_base", "nf4", {"modules_to_save": ["norm"]}),
    ("tiny_base", "nf4", TIED),
    ("untied_base", "none", {"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]}}),
    ("untied_base", "none", {"modules_to_save": ["embed_tokens", "lm_head"]}),
]


@pytest.mark.parametrize(("base", "quantization", "options"), BESIDE, ids=str)
def test_what_trains_beside_is_saved_and_loaded_by_plain_peft(request, tmp_path, base, quantization, options):
    folder, given = request.getfixturevalue(base), copy.deepcopy(options)
    model = train(make(folder, quantization, lora_options=given))
    assert given == options  # PEFT writes into lists that it is handed
    if options is TIED:
        causal_lm = model.get_base_model()
        assert causal_lm.get_input_embeddings().weight is causal_lm.get_output_embeddings().weight
    identity = {"base": str(folder), "quantization": quantization}
    save_adapter_folder(tmp_path, model, None, identity)
    plain = load_base(str(folder), quantization=quantization, compute_dtype=torch.float32).model
    with without_peft_warnings():
        again = dict(peft.PeftModel.from_pretrained(plain, tmp_path).named_parameters())
    own = trainable_tensors(model)
    assert any(".lora_A." not in name and ".lora_B." not in name for name in own)
    assert all(torch.equal(again[name], tensor) for name, tensor in own.items())


@pytest.mark.parametrize("change", [dict.popitem, lambda values: values.update(more=torch.ones(1))])
def test_of_tensors_that_do_not_fit_none_is_copied(tiny_base, change):
    model = make(tiny_base, rank=2)
    before = {name: tensor.detach().clone() for name, tensor in trainable_tensors(model).items()}
    values = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    change(values)
    with pytest.raises(UserError, match=r"The file does not fit the adapter"):
        copy_tensors(model, values, "The file")
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainable_tensors(model).items())
