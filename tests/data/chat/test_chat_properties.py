"""Whatever a conversation says, what is trained of it is the answer and its stop token, or the row is refused."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lightning.data.chat.labels import ChatRenderer
from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import Chat
from tests.flat import render

CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
SPECIAL = {
    "llama2": ["<s>", "</s>", "<unk>"],
    "llama31": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
    "deepseek_r1": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
    "gpt_oss": ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
    **dict.fromkeys(("qwen25", "qwen3", "qwen3_agent", "markers"), CHATML),
}
CONTROLS = sorted({token for tokens in SPECIAL.values() for token in tokens})
TEXT_LIKE_MARKERS = ["[INST", "<<SYS>>\n", "<|im_", "end|>", "{% generation %}", "{{ bos_token }}", "assistant\n", "▁"]
SPACES = ["\n", "\n\n", "\n\n\n", " ", "  ", "\t", "\r\n", "\x00", "\u2028", "\u00a0", "\u200b"]
HUGE = ["two and two " * 300, "\n" * 500, "é🙂" * 200]
BASIC = ["llama2", "llama31", "qwen25", "mistral", "markers"]  # whose templates neither add nor drop reasoning

reproducible = settings(derandomize=True, database=None, deadline=None, max_examples=60)
plain = st.lists(st.one_of(st.text(max_size=8), st.sampled_from([*TEXT_LIKE_MARKERS, *SPACES])), max_size=5).map(
    "".join
)
typed = st.tuples(plain, st.sampled_from(CONTROLS), plain)
contents = st.one_of(plain, plain, plain, plain, plain, typed.map("".join), st.sampled_from(HUGE))
thoughts = st.tuples(plain, st.sampled_from(["<think>", "</think>", "<think>\n\n</think>\n\n", "<0x0A>"]), plain)


@st.composite
def conversations(draw):
    """One to three questions with their answers, with a system prompt or without."""
    conversation = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        answer = draw(st.one_of(contents, thoughts.map("".join)))
        conversation += [{"role": "user", "content": draw(contents)}, {"role": "assistant", "content": answer}]
    return conversation


def places_of_answers(conversation):
    return [number for number, message in enumerate(conversation) if message["role"] == "assistant"]


def labelled_stretches(rendered):
    """First and last + 1 of each stretch of labelled tokens."""
    edges = [n for n, (a, b) in enumerate(itertools.pairwise([-100, *rendered.labels, -100])) if (a < 0) != (b < 0)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def controls(tokenizer, ids):
    return [number for number in ids if number in tokenizer.all_special_ids]


@reproducible
@given(name=st.sampled_from(BASIC), conversation=conversations())
def test_the_labelled_tokens_are_the_answers_and_their_stop_tokens_or_the_row_is_refused(families, name, conversation):
    tokenizer, renderer = families[name], ChatRenderer(families[name])
    try:
        samples = render(renderer, Chat(conversation))
    except RowFault:
        said = "".join(message["content"] for message in conversation)
        assert name == "llama2" or any(token in said for token in CONTROLS)  # Llama-2's cannot write back any text
        return
    stretches = [(sample, *ends) for sample in samples for ends in labelled_stretches(sample)]
    for turn, (sample, first, after) in zip(places_of_answers(conversation), stretches, strict=True):
        prompt = tokenizer.apply_chat_template(conversation[:turn], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(conversation[: turn + 1], tokenize=False)
        assert text.startswith(prompt)
        answer, stop, _ = text[len(prompt) :].partition(tokenizer.eos_token)
        assert conversation[turn]["content"].strip() in answer
        before = tokenizer.decode(sample.ids[:first])
        assert tokenizer.decode(sample.ids[:after])[len(before) :] == answer + stop
        assert sample.ids[after - 1] == sample.labels[after - 1] == tokenizer.eos_token_id
        assert sample.ids[:first] == renderer.render_prompt(conversation[:turn])
    # nothing that stands in a message became a control token: there are those of the same turns that say "x"
    skeleton = render(renderer, Chat([{**message, "content": "x"} for message in conversation]))
    assert [controls(tokenizer, one.ids) for one in samples] == [controls(tokenizer, one.ids) for one in skeleton]


@reproducible
@given(data=st.data(), name=st.sampled_from(sorted(SPECIAL)), conversation=conversations())
def test_a_control_token_inside_a_message_is_always_refused(families, data, name, conversation):
    message = data.draw(st.sampled_from(conversation))
    at = data.draw(st.integers(0, len(message["content"])))
    token = data.draw(st.sampled_from(SPECIAL[name]))
    message["content"] = message["content"][:at] + token + message["content"][at:]
    renderer = ChatRenderer(families[name])
    with pytest.raises(RowFault, match="contains the control token"):
        render(renderer, Chat(conversation))
    with pytest.raises(RowFault, match="contains the control token"):
        renderer.render_prompt(conversation)
