import pytest
import torch
from transformers import GenerationConfig

from qlora_lightning.model import generate
from qlora_lightning.model.adapters.lora import add_adapters
from qlora_lightning.model.base_model import load_base
from qlora_lightning.model.generate import generate_answers, generate_padded
from qlora_lightning.model.layers.attention import register_flat_attention

PROMPTS = [[11, 12, 13, 14, 15, 16], [21], [31, 32, 33]]
NEVER = 49_151  # a stop token that is not generated within a few tokens


@pytest.fixture(scope="module")
def model(tiny_base):
    made = add_adapters(load_base(str(tiny_base), compute_dtype=torch.float32).model)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    return made


def answer(model, *prompts, stop_ids=(NEVER,), max_new_tokens=6, **options):
    return generate_answers(model, prompts, stop_ids=stop_ids, max_new_tokens=max_new_tokens, **options)


def test_answers_of_a_batch_equal_answers_alone(model):
    together = answer(model, *PROMPTS)
    assert together == [answer(model, prompt)[0] for prompt in PROMPTS]
    assert [len(ids) for ids in together] == [6, 6, 6]


def test_an_answer_is_the_most_likely_token_each_time(model):
    ids = list(PROMPTS[0])
    model.eval()
    for _ in range(6):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer(model, PROMPTS[0]) == [ids[len(PROMPTS[0]) :]]


def test_an_answer_ends_before_its_first_stop_token_and_the_others_go_on(model):
    first, second, third = answer(model, *PROMPTS)
    stop = first[2]
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in (first, second, third)]
    assert answer(model, *PROMPTS, stop_ids=(stop, NEVER)) == expected
    assert len(expected[0]) <= 2


@pytest.mark.parametrize("share", [0.0, 1.0])  # none leaves before all have stopped; each leaves at once
def test_when_stopped_rows_leave_changes_no_answer(model, monkeypatch, share):
    prompts = [*PROMPTS, [41, 42], [51]]
    stop_ids = (answer(model, *prompts)[0][2], NEVER)
    expected = [answer(model, prompt, stop_ids=stop_ids)[0] for prompt in prompts]
    monkeypatch.setattr(generate, "_STILL_GOING", share)
    assert answer(model, *prompts, stop_ids=stop_ids) == expected
    assert len(set(map(len, expected))) > 1


def test_a_prompt_may_hold_the_stop_token(model):
    assert answer(model, [11, NEVER, 12]) == [answer(model, [11, NEVER, 12], [21])[0]]
    assert len(answer(model, [11, NEVER, 12])[0]) == 6


def test_without_prompts_there_are_no_answers(model):
    assert answer(model) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_put_back(model, training):
    model.train(training)
    answer(model, [11], max_new_tokens=1)
    assert {module.training for module in model.modules()} == {training}


def test_the_training_mode_is_put_back_after_an_error_too(model, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(generate, "KeyValueCache", fail)
    model.train()
    with pytest.raises(RuntimeError, match="out of memory"):
        answer(model, [11])
    assert model.training


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_size_of_a_batch_changes_nothing(model, batch_size):
    done = []
    found = answer(model, *PROMPTS, batch_size=batch_size, watch=done.append)
    assert found == answer(model, *PROMPTS)
    assert sum(done) == 3
    assert max(done) == min(batch_size, 3)


def test_a_batch_holds_no_more_tokens_than_its_budget(model, monkeypatch):
    together = answer(model, *PROMPTS)
    monkeypatch.setattr(generate, "TOKEN_BUDGET", 24)  # two rows of at most 6 + 6 tokens
    assert answer(model, *PROMPTS, watch=(done := []).append) == together
    assert done == [2, 1]


def test_with_the_adapter_off_the_base_answers(model, tiny_base):
    base = load_base(str(tiny_base), compute_dtype=torch.float32).model
    with model.disable_adapter():
        assert answer(model, *PROMPTS) == answer(base, *PROMPTS)
    assert answer(model, *PROMPTS) != answer(base, *PROMPTS)


@pytest.mark.parametrize("attention", ["qlora_flat", "qlora_flat_plain"])
def test_answers_equal_those_of_transformers_own_generate_padded_on_the_left(model, attention):
    implementation = model.get_base_model().config._attn_implementation
    register_flat_attention()
    model.get_base_model().set_attn_implementation(attention)
    ours = answer(model, *PROMPTS, max_new_tokens=12)
    model.get_base_model().set_attn_implementation("sdpa")
    theirs = answer(model, *PROMPTS, max_new_tokens=12)  # of an attention that is not ours
    model.get_base_model().set_attn_implementation(implementation)
    assert ours == theirs
    assert ours == generate_padded(model.eval(), PROMPTS, [NEVER], 12)


def test_a_bases_own_sampling_settings_change_nothing_and_warn_of_nothing(model, monkeypatch):
    greedy = answer(model, *PROMPTS)
    sampling = GenerationConfig(do_sample=True, temperature=5.0, top_p=0.9, top_k=50, eos_token_id=2, pad_token_id=2)
    monkeypatch.setattr(model.get_base_model(), "generation_config", sampling)
    assert answer(model, *PROMPTS) == greedy
