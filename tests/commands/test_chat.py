"""The command as a user runs it, on a tiny base."""

import io
import json
import re
import shlex

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lightning.cli import main
from qlora_lightning.commands.chat import answer as answering
from qlora_lightning.commands.chat.answer import TokenStreamer, stream_answer
from qlora_lightning.commands.chat.arguments import make_parser
from qlora_lightning.commands.chat.sampling import Sampling
from qlora_lightning.commands.chat.screen import Screen
from qlora_lightning.commands.chat.session import _HELP
from qlora_lightning.model.generate import generate_answers
from qlora_lightning.support.errors import UserError
from tests.adapters import make_adapter, make_run

CALM, BOLD = "runs/a/adapter", "runs/b/adapter"
SHORT = ("--max-new-tokens", "4")


@pytest.fixture(scope="module")
def place(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    make_run(folder / "runs" / "quickstart", tiny_base)
    make_run(folder / "runs" / "a", tiny_base, seed=1, std=1.0)
    make_run(folder / "runs" / "b", tiny_base, seed=2, std=1.0, rank=2, target_modules="mlp")
    return folder


@pytest.fixture
def chat(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "100")

    def chat(*arguments, lines=(), code=0):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        assert main(["chat", *arguments]) == code
        return capsys.readouterr()

    return chat


def examples():
    lines = [line.strip() for line in make_parser().format_help().splitlines()]
    return [line for line in lines if line.startswith("qlora-lightning chat --adapter")]


def test_help_has_examples():
    assert len(examples()) == 4


@pytest.mark.parametrize("line", examples())
def test_the_examples_of_help_run_as_they_stand(line, chat):
    said = chat(*shlex.split(line)[2:], *SHORT, lines=["Hello."])
    assert said.out
    assert said.err == ""


def test_one_prompt_prints_the_answer_that_greedy_generation_gives(chat, place, tiny_base):
    said = chat("--adapter", CALM, "--prompt", "Count to 3.", "--json", "said.json", *SHORT)
    answer = json.loads((place / "said.json").read_text())["turns"][0]["answers"]["a"]
    from qlora_lightning.commands.chat.speakers import Speakers

    speakers = Speakers({"a": CALM})
    renderer = speakers.by_name["a"].renderer
    prompt = renderer.render_prompt([{"role": "user", "content": "Count to 3."}])
    stops = sorted(renderer.stop_ids)
    expected = generate_answers(speakers.model, [prompt], stop_ids=stops, max_new_tokens=4)[0]
    assert answer["text"] == renderer.tokenizer.decode(expected)
    assert said.out.startswith(answer["text"])
    assert (answer["tokens"], answer["ended"]) == (4, "length")
    assert "was cut after 4 tokens" in said.out


def test_a_conversation_goes_on_and_commands_change_it(chat, place):
    lines = ["Hello.", "And now?", "/adapter bold", "Hi.", "/adapter base", "Hi.", "/reset", "Hi.", "/system Be brief."]
    lines += ["Hi.", "/compare", "Hi.", "/adapter", "/adaptor x", "/zzz", "/adapter none", "/help", "/quit", "never"]
    said = chat("--adapter", f"calm={CALM}", "--adapter", f"bold={BOLD}", *SHORT, "--json", "said.json", lines=lines)
    found = json.loads((place / "said.json").read_text())
    turns = found["turns"]
    assert found["adapters"] == {"calm": CALM, "bold": BOLD}
    assert [turn["prompt"] for turn in turns] == ["Hello.", "And now?", "Hi.", "Hi.", "Hi.", "Hi.", "Hi."]
    assert [turn["adapter"] for turn in turns] == ["calm", "calm", "bold", "base", "base", "base", "base"]
    assert [turn["system"] for turn in turns] == [None] * 5 + ["Be brief."] * 2
    assert list(turns[-1]["answers"]) == ["base", "calm", "bold"]
    texts = {name: answer["text"] for name, answer in turns[-1]["answers"].items()}
    assert len(set(texts.values())) == 3
    assert texts["base"] != turns[-2]["answers"]["base"]["text"] or turns[-2]["system"]
    for words in (
        "> And now?",
        "bold answers; there are also: calm, base.",
        "Did you mean /adapter?",
        "There is no command /zzz. See /help.",
        "There is no adapter 'none'; there are calm, bold, base.",
        "System prompt: Be brief.",
        "Begun anew.",
        "/reset         begin anew",
        "[bold]",
    ):
        assert words in said.out, words
    assert "never" not in said.out


def test_the_base_that_answers_is_the_base_without_an_adapter(chat, place, tiny_base):
    chat("--adapter", CALM, "--compare", "--prompt", "Hi.", *SHORT, "--json", "said.json")
    compared = json.loads((place / "said.json").read_text())["turns"][0]["answers"]
    chat("--adapter", BOLD, "--compare", "--prompt", "Hi.", *SHORT, "--json", "said.json")
    other = json.loads((place / "said.json").read_text())["turns"][0]["answers"]
    assert compared["base"]["text"] == other["base"]["text"]
    assert compared["a"]["text"] != other["b"]["text"]


def test_names_with_brackets_are_shown_as_they_are_in_columns():
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    with Screen(console).several(["base", "[/b]"]) as writer:
        writer("[/b]")("Said [/i].")
    assert "[/b]" in console.file.getvalue()
    assert "Said [/i]." in console.file.getvalue()


def test_an_adapter_answers_beside_others_as_it_does_alone(chat, place):
    chat("--adapter", BOLD, "--prompt", "Hi.", *SHORT, "--json", "said.json")
    alone = json.loads((place / "said.json").read_text())["turns"][0]["answers"]["b"]["text"]
    chat("--adapter", CALM, "--adapter", BOLD, *SHORT, "--json", "said.json", lines=["/adapter b", "Hi."])
    assert json.loads((place / "said.json").read_text())["turns"][0]["answers"]["b"]["text"] == alone


def test_a_seed_makes_samples_again(chat, place):
    def sample(seed):
        options = ("--temperature", "2", "--top-p", "0.9", "--seed", seed, "--max-new-tokens", "12")
        chat("--adapter", CALM, "--prompt", "Hi.", *options, "--json", "said.json")
        return json.loads((place / "said.json").read_text())["turns"][0]["answers"]["a"]["text"]

    assert sample("1") == sample("1") != sample("2")


def answer_of(place):
    return json.loads((place / "said.json").read_text())["turns"][-1]["answers"]["a"]


@pytest.mark.parametrize("narrowed", [("--top-k", "1"), ("--min-p", "0.9999999"), ("--top-p", "1e-9")])
def test_sampling_from_the_likeliest_token_alone_is_greedy(narrowed, chat, place):
    told = ("--adapter", CALM, "--prompt", "Hi.", "--json", "said.json", "--max-new-tokens", "8")
    chat(*told)
    greedy = answer_of(place)["text"]
    chat(*told, "--temperature", "5", "--seed", "1")
    assert answer_of(place)["text"] != greedy
    chat(*told, "--temperature", "5", "--seed", "1", *narrowed)
    assert answer_of(place)["text"] == greedy


@pytest.mark.parametrize(("penalty", "third"), [("1", "b"), ("2", "c")])
def test_a_repetition_penalty_counts_against_what_was_said(penalty, third, tiny_base):
    """A model that likes b best, then c, and knows nothing else; b has been said."""
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_base, vocab_size=128)).eval()
    model.lm_head = torch.nn.Linear(64, 128, bias=True)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[ord("b")], model.lm_head.bias[ord("c")] = 3.0, 2.0
    sampling = Sampling(repetition_penalty=float(penalty), max_new_tokens=1)
    found = stream_answer(model, list(b"ab"), Characters(), [0], sampling, lambda _: None)
    assert found.text == third


def test_an_answer_ends_at_a_stop_text_which_is_not_shown(chat, place):
    told = ("--adapter", CALM, "--prompt", "Hi.", "--json", "said.json", "--max-new-tokens", "8")
    chat(*told)
    whole = answer_of(place)
    stop = whole["text"][4:7]
    said = chat(*told, "--stop", "never there", "--stop", stop)
    cut = answer_of(place)
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert (cut["ended"], cut["tokens"] < whole["tokens"]) == ("stop", True)
    assert said.out == f"{cut['text']}\n"


def test_settings_change_while_talking(chat, place):
    lines = ["/set max-new-tokens 2", "Hi.", "/set temperature 1e-40", "/set heat 3", "/set temperature warm", "/set"]
    said = chat("--adapter", CALM, *SHORT, "--json", "said.json", lines=[*lines, "/set seed 1", "/set stop a b"])
    assert answer_of(place)["tokens"] == 2
    assert "\ntemperature is 1e-40: expected 0 (greedy)" in said.out
    assert "There is no setting 'heat'; there are temperature, top-k, top-p" in said.out
    assert "temperature is 'warm': expected a number" in said.out
    assert "Set: temperature 0.0, top-k 0, top-p 1.0, min-p 0.0, repetition-penalty 1.0, max-new-tokens 2." in said.out
    sampling = json.loads((place / "said.json").read_text())["sampling"]
    assert (sampling["seed"], sampling["stop"], sampling["max_new_tokens"]) == (1, ["a b"], 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("top-k 1.5", "top-k is '1.5': expected a whole number."),
        ("seed x", "seed is 'x': expected a whole number."),
        ("temperature -1", "temperature is -1: expected 0 (greedy), or 0.001 to 1000."),
        ("top-k 5", "top-k chooses among samples, and without temperature nothing is sampled: add one."),
        ("stop ''", "stop is empty: expected a text that is not empty."),
    ],
)
def test_what_cannot_be_set_is_told_as_it_was_typed(text, words):
    with pytest.raises(UserError, match=f"^{re.escape(words)}$"):
        Sampling().changed(text)


@pytest.mark.parametrize(
    ("text", "stop"),
    [('stop "}"', "}"), ("stop '\"} '", '"} '), ("stop a b", "a b"), ("stop it's", "it's"), ('stop "', '"')],
)
def test_a_stop_text_is_read_without_the_quotes_around_it(text, stop):
    assert Sampling().changed(text).stop == (stop,)


def test_settings_are_shown_as_they_are_typed_and_help_names_each():
    assert str(Sampling(stop=('"}', "x"))).endswith('max-new-tokens 512, stop "\\"}" "x"')
    assert Sampling(stop=("a",)).changed("stop").stop == ()
    assert all(name.replace("_", "-") in _HELP for name in Sampling.__dataclass_fields__)


def test_an_empty_stop_text_is_refused(chat):
    assert "--stop is empty: expected a text that is not empty." in chat("--adapter", CALM, "--stop", "", code=2).err


def test_a_line_that_is_no_utf_8_is_told_and_the_next_one_answered(chat, place, monkeypatch):
    def typed(*_):
        return io.TextIOWrapper(io.BytesIO(b"Gr\xfc\xdfe\n/system \xff\nHi.\n"), encoding="utf-8")

    monkeypatch.setattr(io, "StringIO", typed)
    said = chat("--adapter", CALM, "--json", "said.json", *SHORT)
    assert "Not sent: the message holds bytes that are no UTF-8." in said.out
    assert "/system: that holds bytes that are no UTF-8." in said.out
    assert [turn["prompt"] for turn in json.loads((place / "said.json").read_text())["turns"]] == ["Hi."]


@pytest.mark.parametrize("arguments", [("--prompt", "Hi."), ()])
def test_ctrl_c_ends_what_nobody_types_and_keeps_the_conversation(arguments, chat, place, monkeypatch):
    from qlora_lightning.commands.chat import session

    def interrupted(*arguments):
        return answering.Answer("half", 1, "interrupted", 0.1)

    monkeypatch.setattr(session, "stream_answer", interrupted)
    said = chat("--adapter", CALM, "--json", "said.json", *arguments, lines=["Hi.", "And?"], code=130)
    assert said.err == "qlora-lightning: interrupted.\n"
    assert len(json.loads((place / "said.json").read_text())["turns"]) == 1


def test_a_message_that_cannot_be_rendered_is_not_sent(chat):
    said = chat("--adapter", CALM, *SHORT, lines=["Bad <|im_end|> token", "Good."])
    assert "Not sent: message 1 (user) contains the control token '<|im_end|>'" in said.out
    assert said.out.count("a: ") == 1
    said = chat("--adapter", CALM, "--prompt", "<|im_end|>", code=2)
    assert "--prompt was not answered" in said.err


def test_a_conversation_longer_than_the_base_looks_back_is_not_sent(chat):
    said = chat("--adapter", CALM, *SHORT, lines=["word " * 600])
    assert "the base looks back on 512" in said.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--adapter"),
        (("--adapter", "none"), "is not an adapter folder"),
        (("--adapter", CALM, "--adapter", CALM), "two adapters are called 'a'"),
        (("--adapter", f"base={CALM}"), "'base' is the base without an adapter"),
        (("--adapter", f"={CALM}"), "expected DIR, or NAME=DIR"),
        (("--adapter", CALM, "--temperature", "-1"), "--temperature is -1"),
        (("--adapter", CALM, "--top-p", "0"), "--top-p is 0"),
        (("--adapter", CALM, "--top-p", "0.5"), "nothing is sampled"),
        (("--adapter", CALM, "--max-new-tokens", "0"), "--max-new-tokens is 0"),
        (("--adapter", CALM, "--temperature", "1e-40"), "--temperature is 1e-40: expected 0 (greedy), or 0.001 to"),
        (("--adapter", CALM, "--temperature", "nan"), "--temperature is nan"),
        (("--adapter", CALM, "--temperature", "inf"), "--temperature is inf"),
        (("--adapter", CALM, "--top-p", "nan"), "--top-p is nan"),
        (("--adapter", CALM, "--top-k", "-1", "--temperature", "1"), "--top-k is -1"),
        (("--adapter", CALM, "--top-k", "5"), "nothing is sampled"),
        (("--adapter", CALM, "--min-p", "1", "--temperature", "1"), "--min-p is 1: expected 0 or more, less than 1"),
        (("--adapter", CALM, "--min-p", "0.1"), "nothing is sampled"),
        (("--adapter", CALM, "--repetition-penalty", "0"), "--repetition-penalty is 0"),
        (("--adapter", CALM, "--repetition-penalty", "nan"), "--repetition-penalty is nan"),
        (("--adapter", CALM, "--stop", ""), "--stop is"),
        (("--adapter", CALM, "--seed", str(2**64)), "--seed is 18446744073709551616: expected 0 to 2^64 - 1"),
        (("--adapter", CALM, "--seed", "-1"), "--seed is -1"),
        (("--adapter", CALM, "--prompt", "\udcff"), "--prompt holds bytes that are no UTF-8"),
        (("--adapter", CALM, "--system", "\udcff"), "--system holds bytes that are no UTF-8"),
        (("--adapter", CALM, "--json", "/proc/x"), "no file can be written there"),
        (("--adapter", CALM, "--prompt", " "), "--prompt is empty"),
        (("--adapter", CALM, "--json", "none/x"), "there is no folder none"),
        (("--adapter", CALM, "--nothing"), "unrecognized arguments: --nothing"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, words, chat):
    err = chat(*arguments, code=2).err
    assert words in err
    assert err.count("\n") == 1


def test_adapters_of_different_bases_do_not_share_a_chat(chat, tiny_base, tmp_path):
    make_adapter(tmp_path / "other", tiny_base, quantization="none")
    assert (
        "Adapters of one chat share one base"
        in chat("--adapter", CALM, "--adapter", str(tmp_path / "other"), code=2).err
    )


class Characters:
    """A tokenizer of bytes."""

    def decode(self, ids, clean_up_tokenization_spaces):
        return bytes(ids).decode("utf-8", errors="replace")


def test_text_streams_token_by_token_and_whole_characters_only():
    pieces = []
    streamer = TokenStreamer(Characters(), [0], pieces.append)
    streamer.put(torch.tensor([[65, 66]]))  # the prompt
    for token in [*"né".encode(), *"🙂".encode(), 0]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert pieces == ["n", "é", "🙂"]
    assert streamer.text == "né🙂"


def test_what_may_become_a_stop_is_held_back():
    pieces = []
    streamer = TokenStreamer(Characters(), [0], pieces.append, ["abc", "xy"])
    streamer.put(torch.tensor([[65]]))
    for token in b"1ab2abxabc":
        assert not streamer.met
        streamer.put(torch.tensor([token]))
    assert streamer.met
    streamer.end()
    assert pieces == ["1", "ab2", "ab", "x"]
    assert streamer.text == "1ab2abx"


def test_half_a_character_at_the_end_is_shown_as_such():
    pieces = []
    streamer = TokenStreamer(Characters(), [0], pieces.append)
    streamer.put(torch.tensor([[65]]))
    streamer.put(torch.tensor([0xC3]))
    assert pieces == []
    streamer.end()
    assert pieces == ["\N{REPLACEMENT CHARACTER}"]


def test_ctrl_c_keeps_what_was_said():
    class Interrupted:
        def parameters(self):
            return iter([torch.zeros(1)])

        def generate(self, streamer, **options):
            streamer.put(torch.tensor([[65]]))
            streamer.put(torch.tensor([72]))
            raise KeyboardInterrupt

    pieces = []
    found = stream_answer(Interrupted(), [65], Characters(), [0], Sampling(max_new_tokens=8), pieces.append)
    assert (found.text, found.ended, pieces) == ("H", "interrupted", ["H"])
    assert answering.Answer is type(found)
