import pytest

from qlora_lightning.data.chat.labels import Rendered
from qlora_lightning.data.chat.lengths import split_up
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.support.errors import UserError

STOP = 999
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
TALK = ["First, a question that is earlier.", "An answer that is earlier.", "And now?", "Four."]


@pytest.fixture
def shorten(characters):
    """Return text, trained text and report of the one sample that a conversation becomes, a character a token."""

    def shorten(conversation, max_length, tokenizer=characters, **options):
        class Rows(InstructionDataModule):
            def load_rows(self, split):
                return [{"messages": conversation}] if split == "train" else []

        data = Rows(tokenizer=tokenizer, max_length=max_length, **options)
        data.setup("fit")
        (sample,) = data.samples["train"]
        assert len(sample.ids) <= max_length
        trained = tokenizer.decode([label for label in sample.labels.tolist() if label != -100])
        return tokenizer.decode(sample.ids.tolist()), trained, data.reports["train"]

    return shorten


def turn(role, content, **marks):
    return {"role": role, "content": content, **marks}


def sample(prompt, answer, tail=0):
    """Ids counted from 0; the answer's are labelled."""
    ids = list(range(prompt + answer + tail))
    return Rendered(ids, [number if prompt <= number < prompt + answer else -100 for number in ids])


def test_turns_are_never_welded_together(families, shorten, talk):
    """The middle of the prompt was cut out once: "You are a helpful assistanthat is earlier.<|im_end|>"."""
    tokenizer = families["qwen25"]
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    last = "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>"
    first = (
        "<|im_start|>user\nFirst, a question that is earlier.<|im_end|>\n"
        "<|im_start|>assistant\nAn answer that is earlier.<|im_end|>\n"
    )
    fewest = len(tokenizer.encode(system + last))
    most = len(tokenizer.encode(system + first + last))
    for max_length in range(fewest, most + 2):
        wanted = system + (first if max_length >= most else "") + last
        text, trained, report = shorten([SYSTEM, *talk(*TALK)], max_length, tokenizer)
        assert text.removesuffix("\n") == wanted
        assert trained == ("An answer that is earlier.<|im_end|>" if first in wanted else "") + "Four.<|im_end|>"
        assert report.shortened == (max_length <= most)


def test_the_oldest_turns_go_first_and_the_system_message_stays(shorten, talk):
    conversation = [turn("system", "s"), *talk("q1", "a1", "q2", "a2", "q3", "a3")]
    whole = "{s\ns}\n{u\nq1}\n{a\na1}\n{u\nq2}\n{a\na2}\n{u\nq3}\n{a\na3}\n"
    assert shorten(conversation, 47)[0] == whole[:47]  # what follows the last stop token goes before any turn
    assert shorten(conversation, 46)[:2] == ("{s\ns}\n{u\nq2}\n{a\na2}\n{u\nq3}\n{a\na3}\n", "a2}a3}")
    text, trained, report = shorten(conversation, 32)
    assert (text, trained) == ("{s\ns}\n{u\nq3}\n{a\na3}\n", "a3}")
    assert (report.shortened, report.lost_labels) == (1, 6)
    conversation = [*talk("q1", "a1", "q2"), turn("assistant", "long" * 10, train=False)]
    assert shorten(conversation, 20)[:2] == ("{u\nq1}\n{a\na1}\n", "a1}")  # what follows the last trained answer


def test_the_last_prompt_loses_its_middle(shorten, talk):
    assert shorten(talk("older", "a", "abcdefghijklmnop", "k"), 16)[:2] == ("{u\nabmnop}\n{a\nk}", "k}")
    with_system = [turn("system", "be brief"), *talk("abcdefghijklmnop", "k")]
    assert shorten(with_system, 30)[0] == "{s\nbe brief}\n{u\nabcmnop}\n{a\nk}"
    long_system = [turn("system", "abcdefghijklmnopqrstuvwxyz"), *talk("why", "k")]
    assert shorten(long_system, 30)[0] == "{s\nabcdetuvwxyz}\n{u\nwhy}\n{a\nk}"


def test_an_answer_that_is_too_long_loses_its_end_and_its_stop_token(shorten, talk):
    assert shorten(talk("q", "k" * 20), 16)[:2] == ("{u\nq}\n{a\nkkkkkkk", "kkkkkkk")
    text, trained, _ = shorten(talk("abcdefghijklmnopqrstuvwxyz", "k" * 40), 40)  # the prompt keeps a quarter
    assert (text, trained) == ("{u\nabcvwxyz}\n{a\n" + "k" * 24, "k" * 24)


def test_an_exchange_of_many_calls_that_is_too_long_loses_its_end(shorten):
    steps = [turn(role, f"{role[0]}{number}") for number in range(50) for role in ("assistant", "tool")]
    conversation = [turn("user", "task"), *steps, turn("assistant", "done")]
    assert shorten(conversation, 40)[:2] == ("{u\ntask}\n{a\na0}\n{t\nt0}\n{a\na1}\n{t\nt1}\n{a\n", "a0}a1}")
    steps[1]["content"] = "a long result " * 10
    text, trained, _ = shorten(conversation, 60)
    assert text == "{u\ntask}\n{a\na0}\n{t\na longresult }\n{a\na1}\n{t\nt1}\n{a\na2}\n{t\nt2"
    assert trained == "a0}a1}a2}"


def test_a_row_of_which_nothing_fits_beside_what_must_stay_is_left_out(shorten, talk):
    with pytest.raises(UserError, match="none of 1 rows is left"):
        shorten([turn("system", "abcdefghijklmnop"), *talk("ab", "k")], 10)


def test_each_later_piece_begins_with_a_quarter_of_the_one_before_as_context():
    assert split_up(sample(3, 14), 8) == [
        ([0, 1, 2, 3, 4, 5, 6, 7], [-100, -100, -100, 3, 4, 5, 6, 7]),
        ([6, 7, 8, 9, 10, 11, 12, 13], [-100, -100, 8, 9, 10, 11, 12, 13]),
        ([12, 13, 14, 15, 16], [-100, -100, 14, 15, 16]),
    ]
