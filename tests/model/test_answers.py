"""Greedy answers: in a batch equal to alone, with any adapter, and the base is left as it was."""

import contextlib
import types

import bitsandbytes as bnb
import pytest
import torch

from qlora_lightning import QLoRAModule
from qlora_lightning.model import generate
from qlora_lightning.model.generate import dense_weights, generate_answers
from tests.steps import make_module, randomize

PROMPTS = [[11, 12, 13, 14, 15, 16], [21], [31, 32, 33], [41, 42], [51]]
NEVER = 49_151  # a stop token that is not generated within a few tokens


def make(tiny_base, seed=0, **options):
    module = make_module(tiny_base, **options)
    randomize(module, std=0.08, seed=seed)
    return module


@pytest.fixture(scope="module")
def model(tiny_base):
    return make(tiny_base).model


def answer(model, *prompts, stop_ids=(NEVER,), max_new_tokens=6, **options):
    return generate_answers(model, prompts, stop_ids=stop_ids, max_new_tokens=max_new_tokens, **options)


@pytest.fixture(scope="module")
def together(model):
    return answer(model, *PROMPTS)


def test_an_answer_is_the_most_likely_token_each_time(model, together):
    model.eval()
    for prompt, expected in zip(PROMPTS, together, strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert expected == ids[len(prompt) :]


@pytest.mark.parametrize(("batch_size", "budget"), [(1, 10_000), (2, 10_000), (64, 24)])
def test_batches_of_any_size_give_the_same_answers(model, together, monkeypatch, batch_size, budget):
    monkeypatch.setattr(generate, "TOKEN_BUDGET", budget)  # 24: two rows of at most 6 + 6 tokens
    done = []
    assert answer(model, *PROMPTS, batch_size=batch_size, watch=done.append) == together
    assert sum(done) == len(PROMPTS)
    assert max(done) <= min(batch_size, budget // 7)


@pytest.mark.parametrize("share", [0.0, 1.0])  # none leaves before all have stopped; each leaves at once
def test_an_answer_ends_before_its_first_stop_token_and_the_others_go_on(model, together, monkeypatch, share):
    monkeypatch.setattr(generate, "_STILL_GOING", share)
    stop = together[0][2]
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in together]
    assert answer(model, *PROMPTS, stop_ids=(stop, NEVER)) == expected
    assert len(set(map(len, expected))) > 1


# ---- dense weights ---------------------------------------------------------------------------------------------------


def quantized(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, bnb.nn.Linear4bit)}


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "error"), [("fp32", 0.0), ("bf16", 2**-6)])
def test_with_dense_weights_every_product_is_what_it_was(tiny_base, dtype, error):
    """In float32 to the last bit; in bfloat16 products with weights in 4 bits may go by the C++ loops."""
    model, ids = make(tiny_base, compute_dtype=dtype).model.eval(), torch.tensor([[11, 12, 13]])

    def logits():
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        return torch.stack([model(input_ids=ids).logits, base])

    before, linears = logits(), quantized(model)
    assert len(linears) == 14
    assert not torch.equal(*before)
    with contextlib.suppress(ZeroDivisionError), dense_weights(model) as is_dense:
        assert is_dense
        torch.testing.assert_close(logits(), before, rtol=error, atol=error)
        with dense_weights(model):  # inside one another
            pass
        assert quantized(model) == {}
        raise ZeroDivisionError
    assert quantized(model) == linears


def test_without_memory_for_it_nothing_is_made_dense(model, monkeypatch):
    needed = sum(part.in_features * part.out_features * 4 for part in quantized(model).values())
    for available, expected in ((2 * needed - 2, False), (2 * needed, True)):
        free = types.SimpleNamespace(available=available)
        monkeypatch.setattr(generate.psutil, "virtual_memory", lambda free=free: free)
        with dense_weights(model) as is_dense:
            assert is_dense == expected
            assert len(quantized(model)) == (0 if expected else 14)


# ---- several adapters on one base ------------------------------------------------------------------------------------


@pytest.fixture
def folders(tiny_base, tmp_path):
    """Two adapters of other ranks and targets, and the answers of each alone and of the base."""
    torch.manual_seed(0)  # whatever drew before: A is drawn from it
    answers = {}
    for name, options in {"a": {"rank": 4}, "mlp": {"rank": 2, "target_modules": "attention", "seed": 1}}.items():
        module = make(tiny_base, **options)
        module.save_adapter(tmp_path / name)
        answers[name] = module.answer(PROMPTS, [NEVER], 8)
    with module.model.disable_adapter():
        answers["base"] = module.answer(PROMPTS, [NEVER], 8)
    return tmp_path, answers


def test_each_adapter_answers_as_it_does_alone(tiny_base, folders):
    folder, alone = folders
    module = QLoRAModule(base=str(tiny_base), compute_dtype="fp32", adapter=str(folder / "a"))
    module.configure_model()
    module.add_adapter("mlp", folder / "mlp")  # a name that modules have too
    assert module.autocast_dtype is None
    for _ in range(2):
        module.model.set_adapter("mlp")
        assert module.answer(PROMPTS, [NEVER], 8) == alone["mlp"]
        module.model.set_adapter("default")
        assert module.answer(PROMPTS, [NEVER], 8) == alone["a"]
        with module.model.disable_adapter():
            assert module.answer(PROMPTS, [NEVER], 8) == alone["base"]
    assert alone["a"] != alone["mlp"] != alone["base"]
