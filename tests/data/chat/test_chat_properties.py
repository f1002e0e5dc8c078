"""Whatever a conversation says, what is trained of it is the answer and its stop token, or the row is refused."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lightning.data.chat.labels import ChatRenderer
from qlora_lightning.data.chat.templates import choose_chat_template
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import Chat
from qlora_lightning.support.errors import UserError

SPECIAL = {
    "llama2": ["<s>", "</s>", "<unk>"],
    "llama31": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
    "qwen25": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "qwen3_agent": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "deepseek_r1": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
    "gpt_oss": ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
    "markers": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
}
TEXT_LIKE_MARKERS = ["[INST", "<<SYS>>\n", "<|im_", "end|>", "{% generation %}", "{{ bos_token }}", "assistant\n", "▁"]
SPACES = ["\n", "\n\n", "\n\n\n", " ", "  ", "\t", "\r\n", "\x00", "\u2028", "\u00a0", "\u200b"]
LONG = ["word " * 40, "a, b and c. " * 9, "é🙂" * 30]
HUGE = ["two and two " * 2_000, "\n" * 3_000, "é🙂" * 1_000]

BASIC = ["llama2", "llama31", "qwen25", "mistral", "markers"]  # whose templates neither add nor drop reasoning

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
@given(name=st.sampled_from(BASIC), conversation=conversations())
def test_the_labelled_tokens_are_the_answers_and_their_stop_tokens_or_the_row_is_refused(families, name, conversation):
    tokenizer, renderer = families[name], ChatRenderer(families[name])
    try:
        samples = renderer.render(Chat(conversation))
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
    skeleton = renderer.render(Chat([{**message, "content": "x"} for message in conversation]))
    assert [controls(tokenizer, sample) for sample in samples] == [controls(tokenizer, bare) for bare in skeleton]


def inline(content, thought):
    return content if thought is None else "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + content


def in_qwen3(content, thought):
    return inline(content.lstrip("\n"), thought) + "<|im_end|>"


# what generation must produce of an answer and its reasoning, in the form of each template
FORMS = {
    "llama2": lambda content, thought: f" {inline(content, thought).strip()} </s>",
    "llama31": lambda content, thought: f"{inline(content, thought).strip()}<|eot_id|>",
    "qwen25": lambda content, thought: f"{inline(content, thought)}<|im_end|>",
    "markers": lambda content, thought: f"{inline(content, thought)}<|im_end|>",
    "mistral": lambda content, thought: f" {inline(content, thought)}</s>",
    "qwen3": in_qwen3,
    "qwen3_agent": in_qwen3,
    "deepseek_r1": lambda content, thought: (
        (thought.strip("\n") + "\n</think>\n\n" if thought else "") + content.lstrip("\n") + "<｜end▁of▁sentence｜>"
    ),
    "gpt_oss": lambda content, thought: (
        (f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else "")
        + f"<|channel|>final<|message|>{content}<|return|>"
    ),
}
words = st.lists(st.sampled_from(["four", "is", "Why?", "é🙂", *SPACES[:6], "{{ x }}", "[INST", "\n\n- "]), max_size=6)
sayings = st.tuples(words.map("".join), st.sampled_from("ab"), words.map("".join)).map("".join)


@st.composite
def reasoned_conversations(draw):
    """Questions and answers, some of which come with reasoning."""
    conversation = [{"role": "system", "content": draw(sayings)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        answer = {"role": "assistant", "content": draw(sayings)}
        if draw(st.booleans()):
            answer["reasoning_content"] = draw(sayings)
        conversation += [{"role": "user", "content": draw(sayings)}, answer]
    return conversation


def trained_turns(tokenizer, samples):
    """What each stretch of labels adds to the decoded text: by itself sentencepiece would drop its first space."""
    read = tokenizer.decode
    return [
        read(sample.ids[:after])[len(read(sample.ids[:first])) :]
        for sample in samples
        for first, after in labelled_stretches(sample)
    ]


@settings(reproducible, max_examples=300)
@given(
    name=st.sampled_from(sorted(FORMS)),
    conversation=reasoned_conversations(),
    reasoning=st.sampled_from(["template", "keep", "drop"]),
)
def test_labels_are_what_generation_must_produce_reasoning_included(families, name, conversation, reasoning):
    tokenizer, renderer = families[name], ChatRenderer(families[name], reasoning=reasoning)
    samples = renderer.render(Chat(conversation))
    answers = [message for message in conversation if message["role"] == "assistant"]
    thoughts = [answer.get("reasoning_content") for answer in answers]
    if reasoning == "drop":
        thoughts[:-1] = [None] * (len(answers) - 1)
    wanted = [FORMS[name](answer["content"], thought) for answer, thought in zip(answers, thoughts, strict=True)]
    assert trained_turns(tokenizer, samples) == wanted
    assert len(samples) == 1 or reasoning != "keep"
    own = ("<think>\n\n</think>\n\n", "\n</think>\n\n")  # which a template writes where there is no reasoning
    starts = [sample.ids[:first] for sample in samples for first, _ in labelled_stretches(sample)]
    places = [number for number, message in enumerate(conversation) if message["role"] == "assistant"]
    for number, start, thought in zip(places, starts, thoughts, strict=True):
        prompt = renderer.render_prompt(conversation[:number])
        if start != prompt:
            assert thought is None
            assert tokenizer.decode(start).removeprefix(tokenizer.decode(prompt)) in own


@reproducible
@given(name=st.sampled_from(["qwen3", "qwen3_agent"]), conversation=reasoned_conversations())
def test_the_block_of_a_prompt_without_thinking_is_not_trained(families, name, conversation):
    chosen = choose_chat_template(families[name], None, {"enable_thinking": False})
    for message in conversation:
        message.pop("reasoning_content", None)
    samples = ChatRenderer(chosen).render(Chat(conversation))
    answers = [message["content"] for message in conversation if message["role"] == "assistant"]
    assert trained_turns(chosen, samples) == [in_qwen3(answer, None) for answer in answers]


parts = st.lists(st.tuples(st.sampled_from(["a", "ab ", "\n", " ", "é", "🙂"]), st.booleans()), min_size=1, max_size=8)


@reproducible
@given(name=st.sampled_from(sorted(FORMS)), drawn=st.lists(parts, min_size=1, max_size=3))
def test_no_character_that_is_not_to_be_trained_is_trained(families, name, drawn):
    """What is not trained is capital letters and the Greek ones, which nothing else has."""
    conversation = []
    for pieces in drawn:
        content, untrained = "x", []
        for text, trained in pieces:
            if not trained:
                text = text.upper().replace("É", "Ω").replace("🙂", "𝒳").replace(" ", "Z").replace("\n", "Y")
                untrained.append((len(content), len(content) + len(text)))
            content += text
        answer = {"role": "assistant", "content": content, "untrained": untrained}
        conversation += [{"role": "user", "content": "q"}, answer]
    tokenizer = families[name]
    samples = ChatRenderer(tokenizer).render(Chat(conversation))
    said = "".join(trained_turns(tokenizer, samples))
    assert not set(said) & set("ABZYΩ𝒳\ufffd")
    assert said.count("x") == said.count(tokenizer.eos_token) == len(drawn)
    if name == "qwen25":  # of characters that are tokens by themselves nothing else is lost
        assert said.count("é") >= sum(text == "é" and trained for pieces in drawn for text, trained in pieces)


@reproducible
@given(
    name=st.sampled_from(["llama31", "qwen25", "mistral", "markers"]), conversation=conversations(harmless, harmless)
)
def test_text_without_control_tokens_is_never_refused(families, name, conversation):
    # the families whose tokenizers write any text back as it was, and whose templates change none
    assert ChatRenderer(families[name]).render(Chat(conversation))


@reproducible
@given(data=st.data(), name=st.sampled_from(sorted(SPECIAL)), conversation=conversations())
def test_a_control_token_inside_a_message_is_always_refused(families, data, name, conversation):
    message = data.draw(st.sampled_from(conversation))
    at = data.draw(st.integers(0, len(message["content"])))
    typed = data.draw(st.sampled_from(SPECIAL[name]))
    message["content"] = message["content"][:at] + typed + message["content"][at:]
    renderer = ChatRenderer(families[name])
    with pytest.raises(RowFault, match="contains the control token"):
        renderer.render(Chat(conversation))
    with pytest.raises(RowFault, match="contains the control token"):
        renderer.render_prompt(conversation)


@st.composite
def long_conversations(draw):
    """Exchanges that may begin with two questions, of which some are not trained; the last one is; no two are alike."""
    brief = plain.filter(
        lambda text: not any(token in text for tokens in SPECIAL.values() for token in [*tokens, "\0"])
    )
    texts = st.one_of(brief, st.sampled_from(LONG))
    roles = ["system"] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        roles += ["user"] * draw(st.integers(1, 2)) + ["assistant"]
    conversation = [{"role": role, "content": f"{n}{draw(texts)}"} for n, role in enumerate(roles)]
    for message in conversation[:-1]:
        if message["role"] == "assistant":
            message["train"] = draw(st.booleans())
    return [*conversation[:-1], {**conversation[-1], "train": True}]


def is_cut_of(text, content):
    """Whether the text is the content, or a beginning and an end of it, each as a template may strip it."""
    return any(
        content.strip().startswith(text[:at].strip()) and content.strip().endswith(text[at:].strip())
        for at in range(len(text) + 1)
    )


def find_behind(text, parts, contents):
    """Return what follows a text that is these parts with cuts of the contents between them; None if it is not."""
    if not contents:
        return parts[0].removeprefix(text) if text and parts[0].startswith(text) else None
    if not text.startswith(parts[0]):
        return None
    rest = text.removeprefix(parts[0])
    for kept in range(len(rest) + 1):
        behind = find_behind(rest[kept:], parts[1:], contents[1:])
        if behind is not None and is_cut_of(rest[:kept], contents[0]):
            return behind
    return None


def explain(tokenizer, conversation, sample):
    """Find (first message, whether messages lost their middles, text behind the sample) of a rendered conversation."""
    ids, text = sample.ids.tolist(), tokenizer.decode(sample.ids)
    system = conversation[:1] if conversation[0]["role"] == "system" else []
    users = [number for number, message in enumerate(conversation) if message["role"] == "user"]
    ends = [number for number, message in enumerate(conversation) if message.get("train")]
    for start, end in [(start, end) for start in users for end in reversed(ends) if start < end]:
        messages = [*system, *conversation[start : end + 1]]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        if tokenizer.encode(whole, add_special_tokens=False)[: len(ids)] == ids:
            return start, False, whole[len(text.rstrip("\ufffd")) :]
        others = [at for at, message in enumerate(messages[:-1]) if not message.get("train")]
        for places in [*((at,) for at in others), *((0, at) for at in others[1:] if system)]:
            marked = [{**one, "content": "\ue000"} if at in places else one for at, one in enumerate(messages)]
            parts = tokenizer.apply_chat_template(marked, tokenize=False).split("\ue000")
            behind = find_behind(text.rstrip("\ufffd"), parts, [messages[at]["content"] for at in places])
            if behind is not None:
                return start, True, behind
    raise AssertionError(f"not a rendered conversation: {text!r}")


@reproducible
@given(
    name=st.sampled_from(["llama31", "qwen25", "mistral", "markers"]),
    conversation=long_conversations(),
    max_length=st.integers(2, 900),
)
def test_what_is_shortened_is_a_rendered_conversation(families, name, conversation, max_length):
    tokenizer = families[name]
    if name == "mistral":  # whose turns alternate, and whose system message moves to the last one
        pairs = itertools.pairwise([message for message in conversation if message["role"] != "system"])
        conversation = [one for one, other in pairs if one["role"] != other["role"]] + conversation[-1:]
    rows = type("Rows", (InstructionDataModule,), {"load_rows": lambda self, split: [{"messages": conversation}]})
    data = rows(tokenizer=tokenizer, max_length=max_length)
    refused = ""
    try:
        data.setup("validate")
    except UserError as error:
        refused = str(error)
    system = conversation[:1] if conversation[0]["role"] == "system" else []
    users = [number for number, message in enumerate(conversation) if message["role"] == "user"]
    if refused:  # only if no answer can begin, however much the messages lose
        assert "none of 1 rows is left (1: no labelled token within max_length)" in refused
        asked = [*system, conversation[users[-1]]]
        kept = {"system": 2, "user": 1}  # characters at either end
        least = [
            {**message, "content": message["content"][:few] + message["content"][few:][-few:]}
            for message, few in ((message, kept[message["role"]]) for message in asked)
        ]
        assert len(data.renderer.render_prompt(least)) >= max_length
        return
    (sample,) = data.samples["val"]
    assert len(sample.ids) <= max_length
    start, cut, lost = explain(tokenizer, conversation, sample)
    labels = [label for label in sample.labels.tolist() if label != -100]
    stop = tokenizer.eos_token_id
    assert labels
    # a stop token is trained behind each trained answer that is whole, and behind no other
    whole = tokenizer.eos_token not in lost
    assert (labels[-1] == stop) == whole
    said = tokenizer.decode(labels).split(tokenizer.eos_token)
    answers = [message["content"].strip() for message in conversation[start:] if message.get("train")]
    for text, answer in zip(said, answers, strict=False):
        assert text.strip() == answer or (text is said[-1] and answer.startswith(text.strip().rstrip("\ufffd")))
    last = max(number for number, message in enumerate(conversation) if message.get("train"))
    assert len(said) - whole == len(answers)
    # whole turns go first, and no more of them than must
    if cut or not whole:
        assert start == max(number for number in users if number < last)
    elif start != users[0]:
        older = [*system, *conversation[users[users.index(start) - 1] : last + 1]]
        text = tokenizer.apply_chat_template(older, tokenize=False)
        text = text[: text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]
        assert len(tokenizer.encode(text, add_special_tokens=False)) > max_length
