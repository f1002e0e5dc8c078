"""Whatever a conversation says, what is trained of it is the answer and its stop token, or the row is refused."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lightning.data.chat.renderer import ChatRenderer
from qlora_lightning.data.reading.bad_rows import RowFault

SPECIAL = {
    "llama2": ["<s>", "</s>", "<unk>"],
    "llama31": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
    "qwen25": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
    "markers": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
}
TEXT_LIKE_MARKERS = ["[INST", "<<SYS>>\n", "<|im_", "end|>", "{% generation %}", "{{ bos_token }}", "assistant\n", "▁"]
SPACES = ["\n", "\n\n", "\n\n\n", " ", "  ", "\t", "\r\n", "\x00", "\u2028", "\u00a0", "\u200b"]
HUGE = ["two and two " * 2_000, "\n" * 3_000, "é🙂" * 1_000]

reproducible = settings(derandomize=True, database=None, deadline=None, max_examples=100)
plain = st.lists(st.one_of(st.text(max_size=8), st.sampled_from([*TEXT_LIKE_MARKERS, *SPACES])), max_size=5).map(
    "".join
)
typed = st.tuples(plain, st.sampled_from(sorted({token for tokens in SPECIAL.values() for token in tokens})), plain)
contents = st.one_of(plain, plain, plain, plain, plain, typed.map("".join), st.sampled_from(HUGE))
thoughts = st.tuples(plain, st.sampled_from(["<think>", "</think>", "<think>\n\n</think>\n\n", "<0x0A>"]), plain)
answers = st.one_of(contents, thoughts.map("".join))
harmless = st.one_of(plain, plain, st.sampled_from(HUGE)).filter(
    lambda text: not any(token in text for tokens in SPECIAL.values() for token in tokens)
)


@st.composite
def conversations(draw, contents=contents, answers=answers):
    """One to three questions with their answers, with a system prompt or without."""
    conversation = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        conversation += [{"role": "user", "content": draw(contents)}, {"role": "assistant", "content": draw(answers)}]
    return conversation


def labelled_stretches(rendered):
    """(first id, ids, first + number) of each stretch of labelled tokens."""
    edges = [n for n, (a, b) in enumerate(itertools.pairwise([-100, *rendered.labels, -100])) if (a < 0) != (b < 0)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def controls(tokenizer, rendered):
    return [number for number in rendered.ids if number in tokenizer.all_special_ids]


@reproducible
@given(name=st.sampled_from(sorted(SPECIAL)), conversation=conversations())
def test_the_labelled_tokens_are_the_answers_and_their_stop_tokens_or_the_row_is_refused(families, name, conversation):
    tokenizer, renderer = families[name], ChatRenderer(families[name])
    try:
        samples = renderer.render(conversation)
    except RowFault:
        return
    stretches = [(sample, *ends) for sample in samples for ends in labelled_stretches(sample)]
    turns = [number for number, message in enumerate(conversation) if message["role"] == "assistant"]
    for turn, (sample, first, after) in zip(turns, stretches, strict=True):
        prompt = tokenizer.apply_chat_template(conversation[:turn], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(conversation[: turn + 1], tokenize=False)
        assert text.startswith(prompt)
        answer, stop, _ = text[len(prompt) :].partition(tokenizer.eos_token)
        assert conversation[turn]["content"].strip() in answer
        before = tokenizer.decode(sample.ids[:first])  # by itself a stretch would lose its first space
        assert tokenizer.decode(sample.ids[:after])[len(before) :] == answer + stop
        assert sample.ids[after - 1] == sample.labels[after - 1] == tokenizer.eos_token_id
        assert sample.ids[:first] == renderer.render_prompt(conversation[:turn])
    # nothing that stands in a message became a control token: there are those of the same turns that say "x"
    skeleton = renderer.render([{**message, "content": "x"} for message in conversation])
    assert [controls(tokenizer, sample) for sample in samples] == [controls(tokenizer, bare) for bare in skeleton]


@reproducible
@given(
    name=st.sampled_from(["llama31", "qwen25", "mistral", "markers"]), conversation=conversations(harmless, harmless)
)
def test_text_without_control_tokens_is_never_refused(families, name, conversation):
    # the families whose tokenizers write any text back as it was, and whose templates change none
    assert ChatRenderer(families[name]).render(conversation)


@reproducible
@given(data=st.data(), name=st.sampled_from(sorted(SPECIAL)), conversation=conversations())
def test_a_control_token_inside_a_message_is_always_refused(families, data, name, conversation):
    message = data.draw(st.sampled_from(conversation))
    at = data.draw(st.integers(0, len(message["content"])))
    typed = data.draw(st.sampled_from(SPECIAL[name]))
    message["content"] = message["content"][:at] + typed + message["content"][at:]
    renderer = ChatRenderer(families[name])
    for refusing in (renderer.render, renderer.render_prompt):
        with pytest.raises(RowFault, match="contains the control token"):
            refusing(conversation)
