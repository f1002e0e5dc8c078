"""Samples longer than ``max_length``: shortened, never so that turns are welded together, or split."""

import pytest

from tests.data.conftest import prepare_rows, render_row
from tests.errors import rejects
from tests.packed import unpack

TALK = ["First, a question that is earlier.", "An answer that is earlier.", "And now?", "Four."]


def turn(role, content, **marks):
    return {"role": role, "content": content, **marks}


def turns(*contents, system=None):
    """User, assistant, user, …, behind a system message if there is one."""
    begin = [turn("system", system)] if system else []
    return begin + [turn(("user", "assistant")[number % 2], content) for number, content in enumerate(contents)]


def steps(result="t0"):
    """A task, fifty calls with their results, and an answer."""
    calls = [turn(role, f"{role[0]}{number}") for number in range(50) for role in ("assistant", "tool")]
    calls[1]["content"] = result
    return [turn("user", "task"), *calls, turn("assistant", "done")]


def shorten(conversation, max_length, tokenizer):
    """Return text, trained text and report of the one sample that a conversation becomes."""
    data = prepare_rows([{"messages": conversation}], tokenizer, max_length=max_length)
    (sample,) = unpack(data.samples["train"])
    assert len(sample.ids) <= max_length
    trained = tokenizer.decode([label for label in sample.labels if label != -100])
    return tokenizer.decode(sample.ids), trained, data.reports["train"]


def test_turns_are_never_welded_together(families):
    """The middle of the prompt was cut out once: "You are a helpful assistanthat is earlier.<|im_end|>"."""
    tokenizer = families["qwen2_5"]
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    last = "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>"
    first = (
        "<|im_start|>user\nFirst, a question that is earlier.<|im_end|>\n"
        "<|im_start|>assistant\nAn answer that is earlier.<|im_end|>\n"
    )
    fewest, most = len(tokenizer.encode(system + last)), len(tokenizer.encode(system + first + last))
    for max_length in range(fewest, most + 2):
        wanted = system + (first if max_length >= most else "") + last
        conversation = turns(*TALK, system="You are a helpful assistant.")
        text, trained, report = shorten(conversation, max_length, tokenizer)
        assert text.removesuffix("\n") == wanted
        assert trained == ("An answer that is earlier.<|im_end|>" if first in wanted else "") + "Four.<|im_end|>"
        assert report.shortened == (max_length <= most)


SIX = turns("q1", "a1", "q2", "a2", "q3", "a3", system="s")
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    ("conversation", "max_length", "text", "trained"),
    [
        # what follows the last stop token goes first, then the oldest turns; the system message stays
        (SIX, 47, "{s\ns}\n{u\nq1}\n{a\na1}\n{u\nq2}\n{a\na2}\n{u\nq3}\n{a\na3}", "a1}a2}a3}"),
        (SIX, 46, "{s\ns}\n{u\nq2}\n{a\na2}\n{u\nq3}\n{a\na3}\n", "a2}a3}"),
        (SIX, 32, "{s\ns}\n{u\nq3}\n{a\na3}\n", "a3}"),
        # what follows the last trained answer
        ([*turns("q1", "a1", "q2"), turn("assistant", "long" * 10, train=False)], 20, "{u\nq1}\n{a\na1}\n", "a1}"),
        # the last prompt, or a long system message, loses its middle
        (turns("older", "a", ALPHABET[:16], "k"), 16, "{u\nabmnop}\n{a\nk}", "k}"),
        (turns(ALPHABET[:16], "k", system="be brief"), 30, "{s\nbe brief}\n{u\nabcmnop}\n{a\nk}", "k}"),
        (turns("why", "k", system=ALPHABET), 30, "{s\nabcdetuvwxyz}\n{u\nwhy}\n{a\nk}", "k}"),
        # an answer loses its end and its stop token, and leaves the prompt a quarter
        (turns("q", "k" * 20), 16, "{u\nq}\n{a\nkkkkkkk", "kkkkkkk"),
        (turns(ALPHABET, "k" * 40), 40, "{u\nabcvwxyz}\n{a\n" + "k" * 24, "k" * 24),
        # an exchange of many calls loses its end
        (steps(), 40, "{u\ntask}\n{a\na0}\n{t\nt0}\n{a\na1}\n{t\nt1}\n{a\n", "a0}a1}"),
        (
            *(steps("a long result " * 10), 60),
            *("{u\ntask}\n{a\na0}\n{t\na longresult }\n{a\na1}\n{t\nt1}\n{a\na2}\n{t\nt2", "a0}a1}a2}"),
        ),
    ],
)
def test_what_is_left_of_a_long_conversation(characters, conversation, max_length, text, trained):
    assert shorten(conversation, max_length, characters)[:2] == (text, trained)


def test_lost_labels_are_counted_and_a_row_of_which_nothing_fits_is_left_out(characters):
    report = shorten(SIX, 32, characters)[2]
    assert (report.shortened, report.lost_labels) == (1, 6)
    report = shorten(turns("q", "k" * 20), 16, characters)[2]
    assert (report.shortened, report.lost_labels) == (1, 14)  # 7 of 21 are left, without }
    with rejects("rows.none_left"):
        shorten(turns("ab", "k", system=ALPHABET[:16]), 10, characters)


def test_each_later_piece_begins_with_a_quarter_of_the_one_before_as_context(characters):
    ids = list(range(17))
    row = {"input_ids": ids, "labels": [-100] * 3 + ids[3:]}
    assert render_row(row, characters, max_length=8, too_long="split") == [
        ([0, 1, 2, 3, 4, 5, 6, 7], [-100, -100, -100, 3, 4, 5, 6, 7]),
        ([6, 7, 8, 9, 10, 11, 12, 13], [-100, -100, 8, 9, 10, 11, 12, 13]),
        ([12, 13, 14, 15, 16], [-100, -100, 14, 15, 16]),
    ]
