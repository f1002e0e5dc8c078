"""What trains: adapters on the modules and as the options ask, drawn from the seed alone; and what trains beside."""

import copy
import warnings

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lightning import QLoRAModule, load_base
from qlora_lightning.model.adapters.inject import with_adapter
from qlora_lightning.model.merge import Merge
from tests.errors import rejects
from tests.families import save_random
from tests.steps import fit, make_batch, make_module, trainable_tensors


@pytest.fixture(scope="module")
def untied_base(tmp_path_factory):
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("untied")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, tie_word_embeddings=False, **sizes)).save_pretrained(folder)
    return folder


def make(folder, **settings):
    module = QLoRAModule(str(folder), compute_dtype="fp32", **settings)
    module.configure_model()
    return module.model


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
    ("settings", "key", "fact"),
    [
        ({"target_modules": ["lm_head"]}, "base.tied", "ensure_weight_tying: true"),
        ({"lora_options": {"modules_to_save": ["lm_head"]}}, "base.tied", "[embed_tokens]"),
        ({"lora_options": {"modules_to_save": ["embedding"]}}, "model.lora_options", "names embedding"),
        ({"lora_options": {"trainable_token_indices": {"wte": [5]}}}, "adapter.peft", "'wte'"),
        ({"quantization": "none", "lora_options": {"modules_to_save": ["mlp"]}}, "model.target_modules", "mlp."),
        ({"lora_options": {"bias": "all"}}, "model.lora_options", "sets bias: expected one of"),
        ({"lora_options": {"rank_pattern": {"q_prj": 8}}}, "model.lora_options", "q_prj"),
        ({"lora_options": {"init_lora_weights": "pissa"}}, "model.lora_options", "'pissa'"),
        ({"target_modules": ["q_proj", "v_prj"]}, "model.target_modules", "v_prj"),  # PEFT passes over the second
        ({"target_modules": "*proj"}, "model.target_modules", "'*proj'"),  # no expression
        ({"target_modules": r"model\.layers\.0\..*_proj", "layers": [1]}, "model.layers", "[1]"),
        *(({"layers": layers}, "model.layers", repr(layers)) for layers in ([0, 4], [-1], [], "last:0", 1)),
        ({"optimizer": torch.optim.SGD}, "model.optimizer", "torch.optim.SGD, as text"),
        ({"lora_options": {"trainable_token_indices": []}}, "model.lora_options", "is empty"),
        ({"alpha": 0.0}, "model.alpha", "0.0"),
        ({"dropout": 1.0}, "model.dropout", "1.0"),
    ],
)
def test_what_would_go_wrong_without_a_word_is_rejected(tiny_base, settings, key, fact):
    """Another rank, and misspelt options and targets: see ``tests/test_wrong_inputs.py``."""
    with rejects(key, fact):
        make(tiny_base, **settings)


def test_a_folder_that_parts_a_tied_head_is_rejected(tiny_base, tmp_path):
    """As plain PEFT writes it for a base whose head is its embedding."""
    model = LlamaForCausalLM.from_pretrained(tiny_base)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    with warnings.catch_warnings(action="ignore"):  # PEFT warns of this too
        peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with rejects("base.tied", str(tmp_path), "embed_tokens, lm_head"):
        make(tiny_base, adapter=str(tmp_path))
    with rejects("base.tied", str(tmp_path)):
        Merge(tiny_base, tmp_path)


# ---- what trains beside, by PEFT's own layers ------------------------------------------------------------------------


TIED = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
BESIDE = [
    ("tiny_base", "nf4", {"use_dora": True}),
    ("tiny_base", "nf4", TIED),
    ("untied_base", "none", {"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]}}),
    ("untied_base", "none", {"modules_to_save": ["norm", "lm_head"]}),
]


@pytest.mark.parametrize(("base", "quantization", "options"), BESIDE, ids=str)
def test_what_trains_beside_takes_gradients_and_is_loaded_by_plain_peft(request, tmp_path, base, quantization, options):
    folder, given = request.getfixturevalue(base), copy.deepcopy(options)
    module = make_module(folder, quantization=quantization, lora_options=given)
    assert given == options  # PEFT writes into lists that it is handed
    module.compute_loss(make_batch(vocabulary=20)).loss_sum.backward()
    own = trainable_tensors(module.model)
    assert all(tensor.grad.any() for tensor in own.values())
    if options is TIED:
        assert module.causal_lm.get_input_embeddings().weight is module.causal_lm.get_output_embeddings().weight
    module.save_adapter(tmp_path)
    plain = load_base(str(folder), quantization=quantization, compute_dtype=torch.float32).model
    with warnings.catch_warnings(action="ignore"):
        again = dict(peft.PeftModel.from_pretrained(plain, tmp_path).named_parameters())
    assert any(".lora_A." not in name and ".lora_B." not in name for name in own)
    assert all(torch.equal(again[name], tensor) for name, tensor in own.items())


CAST = [{}, {"use_dora": True}, TIED, {"trainable_token_indices": [5, 6]}, {"modules_to_save": ["norm"]}]


@pytest.mark.parametrize("options", CAST, ids=str)
def test_what_trains_on_a_base_in_bf16_is_in_float32_in_the_optimizer_and_in_the_checkpoint(
    options, tiny_base, rows_file, tmp_path
):
    """PEFT 0.21 makes new parameters of those that it casts."""
    module = make_module(tiny_base, compute_dtype="bf16", learning_rate=1e-5, lora_options=copy.deepcopy(options))
    trained = trainable_tensors(module.model)
    started = {name: tensor.detach().clone() for name, tensor in trained.items()}
    trainer = fit(module, tmp_path, rows_file, max_steps=1)
    assert all(trainable_tensors(module.model)[name] is tensor for name, tensor in trained.items())
    optimized = [tensor for group in trainer.optimizers[0].param_groups for tensor in group["params"]]
    assert sorted(map(id, optimized)) == sorted(map(id, trained.values()))
    trainer.save_checkpoint(tmp_path / "step.ckpt")
    stored = torch.load(tmp_path / "step.ckpt", weights_only=True)["state_dict"]
    for name, tensor in trained.items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, started[name])
        assert torch.equal(tensor, stored[f"model.{name}"])
    if options is CAST[3]:
        embedding, head = module.causal_lm.get_input_embeddings(), module.causal_lm.get_output_embeddings()
        deltas = [part.token_adapter.trainable_tokens_delta["default"] for part in (embedding, head)]
        assert deltas[0] is deltas[1]


@pytest.mark.parametrize("saved", ["norm", "lm_head"])
def test_a_second_adapter_computes_in_bf16_what_it_did_as_the_first(untied_base, tmp_path, saved):
    options = {"quantization": "none", "compute_dtype": "bf16"}
    first = make_module(untied_base, lora_options={"modules_to_save": [saved]}, **options)
    first.save_adapter(tmp_path)
    other = make_module(untied_base, **options)
    trained = [*trainable_tensors(other)]
    other.add_adapter("second", tmp_path)
    assert [*trainable_tensors(other)] == trained
    with with_adapter(other.model, "second"):
        losses = [module.compute_loss(make_batch(vocabulary=50)).loss_sum for module in (first, other)]
        answers = [module.answer([[5, 6, 7]], [], 5) for module in (first, other)]
    assert losses[0] == losses[1]
    assert answers[0] == answers[1]


def test_a_table_of_positions_trains_in_bf16(tmp_path):
    options = {"modules_to_save": ["wpe"]}
    module = make_module(save_random(tmp_path, "gpt2"), quantization="none", compute_dtype="bf16", lora_options=options)
    module.compute_loss(make_batch()).loss_sum.backward()
    assert all(tensor.grad.any() for tensor in trainable_tensors(module.model).values())
