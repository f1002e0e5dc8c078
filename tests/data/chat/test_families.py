"""The renderer on templates in the style of known models, each with a tokenizer of its kind."""

import itertools

import pytest

from qlora_lightning.data.chat.labels import ChatRenderer
from qlora_lightning.data.rows.conversation import Chat

SYSTEM = [{"role": "system", "content": "You answer in one word."}]
ANSWERS = ["yes", "\n\n  yes", " yes ", "é🙂\nyes", "\tyes\n", "yes <html> [INST", "1,000\r\n"]
# what is trained of an answer: the answer as the template writes it where generation goes on, and the stop token
TURNS = {
    "llama2": lambda answer: f" {answer.strip()} </s>",
    "llama31": lambda answer: f"{answer.strip()}<|eot_id|>",
    "qwen25": lambda answer: f"{answer}<|im_end|>",
    "qwen3": lambda answer: answer.lstrip("\n") + "<|im_end|>",  # behind the empty block that the template writes
    "mistral": lambda answer: f" {answer}</s>",
    "markers": lambda answer: f"{answer}<|im_end|>",
}


def spans(rendered):
    """First and last + 1 of each stretch of labelled tokens."""
    edges = [n for n, (a, b) in enumerate(itertools.pairwise([-100, *rendered.labels, -100])) if (a < 0) != (b < 0)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def trained(tokenizer, rendered):
    """What each stretch adds to the decoded text: decoded by itself, sentencepiece would drop its first space."""
    read = tokenizer.decode
    return [read(rendered.ids[:after])[len(read(rendered.ids[:first])) :] for first, after in spans(rendered)]


@pytest.fixture(params=TURNS)
def family(request):
    return request.param


@pytest.fixture
def tokenizer(families, family):
    return families[family]


@pytest.mark.parametrize("system", [[], SYSTEM], ids=["no system prompt", "system prompt"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_several_turns(tokenizer, family, talk, system, answer):
    conversation = system + talk("What?", answer, "And?", f"{answer}!", "And then?", "no")
    rendered = ChatRenderer(tokenizer).render(Chat(conversation))
    said = [text for sample in rendered for text in trained(tokenizer, sample)]
    assert said == [TURNS[family](text) for text in (answer, f"{answer}!", "no")]
    # Mistral moves the system prompt on to the last question, Qwen3 strips thoughts: such a turn is a sample of its own
    apart = family == "qwen3" or (family == "mistral" and system)
    assert len(rendered) == (3 if apart else 1)


def test_one_bos(tokenizer, family, talk):
    for sample in ChatRenderer(tokenizer).render(Chat(SYSTEM + talk("What?", "yes", "And?", "no"))):
        wanted = {"llama2": 2, "llama31": 1, "mistral": 1}.get(family, 0)  # Llama-2 begins each exchange with one
        assert sample.ids.count(tokenizer.bos_token_id) == wanted
        if wanted:
            assert sample.ids[0] == tokenizer.bos_token_id != sample.ids[1]


def test_the_last_answer_only_or_every_token(tokenizer, family, talk):
    conversation = talk("What?", "yes", "And?", "no")
    (last,) = ChatRenderer(tokenizer, train_on="last").render(Chat(conversation))
    assert trained(tokenizer, last) == [TURNS[family]("no")]
    assert tokenizer.decode(last.ids) == tokenizer.apply_chat_template(conversation, tokenize=False)
    for sample in ChatRenderer(tokenizer, train_on="all").render(Chat(conversation)):
        assert sample.labels == [-100, *sample.ids[1:]]
