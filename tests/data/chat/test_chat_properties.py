"""Whatever a conversation says, what is trained of it is the answer and its stop token, or the row is rejected."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lightning import InstructionDataModule, UserError
from tests.data.conftest import make_family, render_row
from tests.errors import rejects

TEXT_LIKE_MARKERS = ["[INST", "<<SYS>>\n", "<|im_", "end|>", "{% generation %}", "{{ bos_token }}", "assistant\n", "▁"]
SPACES = ["\n", "\n\n", "\n\n\n", " ", "  ", "\t", "\r\n", "\x00", "\u2028", "\u00a0", "\u200b"]
HUGE = ["two and two " * 300, "\n" * 500, "é🙂" * 200]
BASIC = ["llama3_1", "qwen2_5", "mistral", "lfm2_v2"]  # whose templates neither add nor drop reasoning
CONTROLS = {
    name: [str(token) for token in make_family(name).added_tokens_decoder.values()]
    for name in (*BASIC, "gptoss", "deepseek_r1_distill", "gemma4_v5")
}

reproducible = settings(derandomize=True, database=None, deadline=None, max_examples=60)
plain = st.lists(st.one_of(st.text(max_size=8), st.sampled_from([*TEXT_LIKE_MARKERS, *SPACES])), max_size=5).map(
    "".join
)
contents = st.one_of(plain, plain, plain, st.sampled_from(HUGE))
thoughts = st.tuples(plain, st.sampled_from(["<think>", "a</think>", "<think>\n\n</think>\n\n", "<0x0A>"]), plain)


@st.composite
def conversations(draw):
    """One to five questions with their answers, with a system prompt or without."""
    conversation = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 5))):
        answer = draw(st.one_of(contents, thoughts.map("".join)))
        conversation += [{"role": "user", "content": draw(contents)}, {"role": "assistant", "content": answer}]
    return conversation


def labelled_stretches(rendered):
    """First and last + 1 of each stretch of labeled tokens."""
    edges = [n for n, (a, b) in enumerate(itertools.pairwise([-100, *rendered.labels, -100])) if (a < 0) != (b < 0)]
    return list(zip(edges[::2], edges[1::2], strict=True))


@reproducible
@given(name=st.sampled_from(BASIC), conversation=conversations())
def test_the_labelled_tokens_are_the_answers_and_their_stop_tokens_or_the_row_is_rejected(families, name, conversation):
    tokenizer, renderer = families[name], InstructionDataModule(tokenizer=families[name]).renderer
    try:
        samples = render_row({"messages": conversation}, tokenizer, max_length=100_000)
    except UserError:
        text = "".join(message["content"] for message in conversation)
        is_empty = not all(message["content"].strip() for message in conversation if message["role"] == "assistant")
        # Mistral's has no system prompt, and its tokenizer cannot write any text
        assert name == "mistral" or is_empty or any(token in text for token in CONTROLS[name])
        return
    turns = [number for number, message in enumerate(conversation) if message["role"] == "assistant"]
    stretches = [(sample, *ends) for sample in samples for ends in labelled_stretches(sample)]
    for turn, (sample, first, after) in zip(turns, stretches, strict=True):
        prompt = tokenizer.apply_chat_template(conversation[:turn], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(conversation[: turn + 1], tokenize=False)
        answer, stop, _ = text.removeprefix(prompt).partition(tokenizer.eos_token)
        assert conversation[turn]["content"].strip() in answer
        before = tokenizer.decode(sample.ids[:first])
        assert tokenizer.decode(sample.ids[:after])[len(before) :] == answer + stop
        assert sample.ids[after - 1] == sample.labels[after - 1] == tokenizer.eos_token_id
        assert sample.ids[:first] == renderer.render_prompt(conversation[:turn])


@reproducible
@given(data=st.data(), name=st.sampled_from(sorted(CONTROLS)), conversation=conversations())
def test_a_control_token_inside_a_message_is_always_rejected(families, data, name, conversation):
    message = data.draw(st.sampled_from(conversation))
    at = data.draw(st.integers(0, len(message["content"])))
    token = data.draw(st.sampled_from(CONTROLS[name]))
    message["content"] = message["content"][:at] + token + message["content"][at:]
    with rejects("row.fault", "contains the control token"):
        InstructionDataModule(tokenizer=families[name]).renderer.render_prompt(conversation)
    for answer in conversation:
        answer["content"] = answer["content"].strip() or "."
    with rejects("rows.bad", "contains the control token"):
        render_row({"messages": conversation}, families[name], max_length=100_000)
