import copy

import peft
import pytest
import torch
from peft.tuners.lora.dora import DoraLinearLayer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qlora_lightning.model.adapters.folder import save_adapter_folder
from qlora_lightning.model.adapters.lora import (
    add_adapters,
    all_names_of_trainable_tensors,
    check_lora_options,
    trainable_tensors,
)
from qlora_lightning.model.base_model import load_base
from qlora_lightning.model.generate import generate_answers
from qlora_lightning.model.layers.fusing import fuse_layers
from qlora_lightning.model.layout import whole_samples
from qlora_lightning.model.loss import head_loss
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.versions import without_peft_warnings

TIED_EMBEDDING = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
IDS = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def untied_base(tmp_path_factory):
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("untied")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make(folder, options, quantization="nf4", dtype=torch.float32, **settings):
    base = load_base(str(folder), quantization=quantization, compute_dtype=dtype).model
    model = add_adapters(base, lora_options=options, base_name=str(folder), **settings)
    fuse_layers(model)
    return model.train()


def backward(model):
    """One forward and backward as the module's compute_loss does them."""
    causal_lm = model.get_base_model()
    samples, positions = whole_samples([IDS.shape[1]]), torch.arange(IDS.shape[1])[None]
    hidden = causal_lm.base_model(input_ids=IDS, position_ids=positions, samples=samples, use_cache=False)
    loss = head_loss(hidden.last_hidden_state[0, :-1], IDS[0, 1:], causal_lm.get_output_embeddings()).nll_sum
    loss.backward()
    return loss.item()


def train(model):
    """Two steps, after which every trainable tensor has moved."""
    optimizer = torch.optim.AdamW(trainable_tensors(model).values(), lr=1e-2, weight_decay=0.0)
    before = {name: tensor.detach().clone() for name, tensor in trainable_tensors(model).items()}
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(backward(model))
        optimizer.step()
    assert losses[2] < losses[0]
    assert all(not torch.equal(tensor, before[name]) for name, tensor in trainable_tensors(model).items())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"r": 8}, "sets 'r', which has a key of its own: set model.rank"),
        ({"lora_alpha": 8}, "set model.alpha"),
        ({"lora_dropout": 0.1}, "set model.dropout"),
        ({"target_modules": "mlp"}, "set model.target_modules"),
        ({"exclude_modules": "mlp"}, "set model.target_modules"),
        ({"layers_to_transform": [1]}, "set model.layers"),
        ({"layers_pattern": "h"}, "set model.layers"),
        ({"base_model_name_or_path": "x"}, "set model.base"),
        ({"revision": "x"}, "set model.revision"),
        ({"use_dorra": True}, "'use_dorra', which peft.LoraConfig does not know. Did you mean 'use_dora'"),
        ({"zzz": True}, "'zzz', which peft.LoraConfig does not know. Known: .*use_dora"),
        ({"megatron_config": {}}, "'megatron_config': refused, since it is not verified"),
        ({"loftq_config": {}}, "'loftq_config': refused"),
        ({"bias": "all"}, "'bias': refused"),
        ({"init_lora_weights": "pissa"}, "'pissa': refused, since it rewrites the frozen base's own weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "'pissa_niter_16': refused, since it rewrites"),
        ({"init_lora_weights": "olora"}, "'olora': refused, since it rewrites"),
        ({"init_lora_weights": "corda"}, "rewrites .*also it needs a pass over data"),
        ({"init_lora_weights": "lora_ga"}, "rewrites .*also it needs a pass over data"),
        ({"init_lora_weights": "eva"}, "'eva': refused, since it needs a pass over data"),
        ({"init_lora_weights": "loftq"}, "'loftq': refused, since it needs the weights before quantization"),
        ({"init_lora_weights": "mica"}, "'mica': refused, since it needs the weights before quantization"),
        ({"init_lora_weights": "xavier"}, "'xavier': expected one of True, False, gaussian, orthogonal"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj is 0, expected a positive whole number"),
        ({"modules_to_save": ["embedding"]}, "names 'embedding', but the base has no such module"),
        ({"modules_to_save": ["q_proj"]}, "names 'q_proj', which is quantized: integers have no gradient"),
        ({"modules_to_save": ["embed_tokens"]}, "ties head and embedding.*Add `ensure_weight_tying: true`"),
        ({"modules_to_save": ["lm_head"]}, "ties head and embedding"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_reason(tiny_base, options, sentence):
    model = load_base(str(tiny_base)).model
    with pytest.raises(UserError, match=sentence):
        check_lora_options(options, model, tied_embeddings=True)


def test_without_tying_head_and_embedding_may_train_apart(untied_base):
    model = load_base(str(untied_base)).model
    check_lora_options({"modules_to_save": ["embed_tokens", "lm_head"]}, model, tied_embeddings=False)


def test_rank_stabilized_lora_scales_by_alpha_over_the_root_of_the_rank(tiny_base):
    model = make(tiny_base, {"use_rslora": True}, rank=4, alpha=6)
    assert model.get_base_model().model.layers[0].self_attn.q_proj.scaling["default"] == 3.0  # 6 / sqrt(4)


def test_patterns_give_modules_their_own_rank_and_alpha(tiny_base):
    model = make(tiny_base, {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 12}}, rank=2, alpha=2)
    attention = model.get_base_model().model.layers[0].self_attn
    assert (attention.q_proj.r["default"], attention.q_proj.scaling["default"]) == (3, 4.0)
    assert (attention.k_proj.r["default"], attention.k_proj.scaling["default"]) == (2, 1.0)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_dora_trains_a_magnitude_for_each_output(tiny_base, quantization):
    model = make(tiny_base, {"use_dora": True}, quantization)
    layers = [m for m in model.modules() if isinstance(m, DoraLinearLayer)]
    assert len(layers) == 2 * 7
    backward(model)
    for name, tensor in trainable_tensors(model).items():
        assert tensor.grad.any() or ".lora_A." in name  # A waits for B
    assert all(layer.weight.grad.any() for layer in layers)


def test_orthogonal_initialization_starts_at_the_base_with_b_away_from_zero(tiny_base):
    model = make(tiny_base, {"init_lora_weights": "orthogonal"}, "none")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.any()
    assert b.any()
    assert (b @ a).abs().max() < 1e-6  # their row and column spaces are orthogonal: nothing changes yet


def test_orthogonal_initialization_is_refused_on_a_quantized_base(tiny_base):
    with pytest.raises(UserError, match=r"orthogonal.*integers have no gradient"):
        make(tiny_base, {"init_lora_weights": "orthogonal"}, "nf4")


TIED = [
    {"trainable_token_indices": [5, 6]},
    {"modules_to_save": ["norm"]},
    TIED_EMBEDDING,
]
UNTIED = [
    {"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]}},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
]


def assert_reloads_with_equal_values(folder, options, quantization, place):
    model = make(folder, options, quantization)
    train(model)
    identity = {"base": str(folder), "quantization": quantization}
    save_adapter_folder(place, model, all_names_of_trainable_tensors(model), None, identity)
    base = load_base(str(folder), quantization=quantization, compute_dtype=torch.float32).model
    with without_peft_warnings():
        again = dict(peft.PeftModel.from_pretrained(base, place).named_parameters())
    own = trainable_tensors(model)
    assert any(".lora_" not in name for name in own)
    assert all(torch.equal(again[name], tensor) for name, tensor in own.items())


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("options", TIED)
def test_what_trains_beside_adapters_is_saved_and_loaded_by_plain_peft(tiny_base, tmp_path, options, quantization):
    assert_reloads_with_equal_values(tiny_base, copy.deepcopy(options), quantization, tmp_path)


@pytest.mark.parametrize("options", UNTIED)
def test_likewise_where_head_and_embedding_are_apart(untied_base, tmp_path, options):
    assert_reloads_with_equal_values(untied_base, copy.deepcopy(options), "none", tmp_path)


def test_tied_head_and_embedding_train_as_one(tiny_base):
    model = make(tiny_base, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True})
    train(model)
    causal_lm = model.get_base_model()
    assert causal_lm.get_input_embeddings().weight is causal_lm.get_output_embeddings().weight
    (saved,) = (name for name in trainable_tensors(model) if ".lora_" not in name)
    assert saved.endswith("embed_tokens.modules_to_save.default.weight")


def test_only_the_chosen_tokens_train(tiny_base):
    model = make(tiny_base, {"trainable_token_indices": [5, 6]})
    (name,) = (name for name in trainable_tensors(model) if ".lora_" not in name)
    assert trainable_tensors(model)[name].shape == (2, 64)
    train(model)
    reference = AutoModelForCausalLM.from_pretrained(tiny_base).get_input_embeddings().weight
    embedded = model.get_base_model().get_input_embeddings()(torch.arange(4, 8))
    moved = [not torch.equal(one, other) for one, other in zip(embedded, reference[4:8], strict=True)]
    assert moved == [False, True, True, False]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"trainable_token_indices": [5, 6]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_over_a_bfloat16_base_it_trains_and_generates(untied_base, options):
    model = make(untied_base, options, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in trainable_tensors(model).values()} == {torch.float32}  # masters
    with torch.autocast("cpu", torch.bfloat16):  # as the module does where not only fused LoRA trains
        backward(model)
        assert len(generate_answers(model, [[5, 6], [7]], stop_ids=[49], max_new_tokens=2)) == 2
