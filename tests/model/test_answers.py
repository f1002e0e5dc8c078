"""Answers: greedy, in a batch equal to alone, and the base is left as it was."""

import pytest
import torch

from qlora_lightning.model import answers
from tests.equality import base_tensors, same
from tests.steps import make_module, randomize

PROMPTS = [[11, 12, 13, 14, 15, 16], [21], [31, 32, 33], [41, 42], [51]]
NEVER = 49_151  # a stop token that is not generated within a few tokens


def make(tiny_base, **options):
    return randomize(make_module(tiny_base, **options), std=0.08)


@pytest.fixture(scope="module")
def module(tiny_base):
    return make(tiny_base)


def answer(module, stop_ids=(NEVER,), **options):
    return module.answer(PROMPTS, list(stop_ids), max_new_tokens=6, **options)


@pytest.fixture(scope="module")
def greedy(module):
    """The most likely token each time, found row by row."""
    model, found = module.eval().model, []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


@pytest.mark.parametrize(("batch_size", "budget"), [(1, 10_000), (64, 10_000), (64, 24)])
def test_padded_rows_are_answered_as_alone_in_batches_of_any_size(module, greedy, monkeypatch, batch_size, budget):
    monkeypatch.setattr(answers, "TOKEN_BUDGET", budget)  # 24: two rows of at most 6 + 6 tokens
    done = []
    assert answer(module, batch_size=batch_size, on_batch=lambda rows, _: done.append(len(rows))) == greedy
    assert sum(done) == len(PROMPTS)
    assert max(done) <= min(batch_size, budget // 7)


def test_memory_that_runs_out_halves_a_batch(module, greedy, monkeypatch):
    causal_lm, passes = module.causal_lm, []
    generate = type(causal_lm).generate

    def scarce(self, ids, **options):
        passes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError
        return generate(self, ids, **options)

    monkeypatch.setattr(type(causal_lm), "generate", scarce)
    assert answer(module) == greedy
    assert passes == [5, 2, 3, 1, 2]


def test_answers_are_greedy_unless_options_ask_otherwise_whatever_the_base_asks_for(module, greedy, monkeypatch):
    config = module.causal_lm.generation_config
    for name, value in {"do_sample": True, "temperature": 9.0, "top_k": 3, "repetition_penalty": 5.0}.items():
        monkeypatch.setattr(config, name, value)
    assert answer(module) == greedy
    assert answer(module, do_sample=True, temperature=9.0) != greedy


def test_an_answer_ends_before_its_first_stop_token_and_the_others_continue(module, greedy):
    stop = greedy[0][2]
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in greedy]
    assert answer(module, stop_ids=(stop, NEVER)) == expected
    assert len(set(map(len, expected))) > 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_answers_are_computed_by_the_same_products_and_the_base_stays(tiny_base, monkeypatch, dtype):
    module, ids = make(tiny_base, compute_dtype=dtype).eval(), torch.tensor([[11, 12, 13]])
    model = module.model
    module.choose_layers()

    def logits():
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        return torch.stack([model(input_ids=ids).logits, base])

    before, base = logits(), base_tensors(model)
    assert not torch.equal(*before)

    def compare(*_, **options):
        assert torch.equal(logits(), before)
        raise ZeroDivisionError

    monkeypatch.setattr(type(module.causal_lm), "generate", compare)
    with pytest.raises(ZeroDivisionError):
        answer(module)
    assert same(base_tensors(model), base)
