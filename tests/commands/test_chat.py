"""``chat`` as a user runs it, on a tiny base."""

import io
import json

import pytest

from qlora_lightning.base.folder import load_tokenizer
from qlora_lightning.cli import main
from qlora_lightning.commands.chat import session
from qlora_lightning.data.chat.labels import ChatRenderer
from qlora_lightning.data.chat.templates import choose_chat_template
from qlora_lightning.model.answers import generate_answers
from qlora_lightning.model.load.build import find_adapter, open_adapter
from tests.adapters import make_run
from tests.help_examples import help_examples

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
    """Run the command; gives its output and the turns that it wrote."""
    monkeypatch.chdir(place)

    def chat(*arguments, lines=(), code=0):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        (place / "said.json").unlink(missing_ok=True)
        assert main(["chat", "--json", "said.json", *arguments]) == code
        captured = capsys.readouterr()
        if not (place / "said.json").exists():
            return captured.out + captured.err, []
        return captured.out, json.loads((place / "said.json").read_text())["turns"]

    return chat


@pytest.mark.parametrize("arguments", help_examples("chat"), ids=" ".join)
def test_the_examples_of_help_run(arguments, chat):
    _, turns = chat(*arguments[1:], *SHORT, lines=["Hello."])
    assert len(turns) == 1


def test_one_prompt_prints_the_answer_that_greedy_generation_gives(chat):
    out, turns = chat("--adapter", CALM, "--prompt", "Count to 3.", *SHORT)
    answer = turns[0]["answers"]["a"]
    renderer = ChatRenderer(choose_chat_template(load_tokenizer(CALM), None))
    prompt = renderer.render_prompt([{"role": "user", "content": "Count to 3."}])
    model = open_adapter(find_adapter(CALM))[0].eval().get_base_model()
    expected = generate_answers(model, [prompt], stop_ids=sorted(renderer.stop_ids), max_new_tokens=4)[0]
    assert answer["text"] == renderer.tokenizer.decode(expected)
    assert out.startswith(answer["text"])
    assert (answer["tokens"], answer["ended"]) == (4, "length")
    assert "was cut after 4 tokens" in out


def test_a_conversation_continues_and_commands_change_it(chat):
    lines = ["Hi.", "Hi.", "/reset", "Hi.", "/system Be brief.", "Hi.", "/system", "Hi.", "/zzz", "/quit", "never"]
    out, turns = chat("--adapter", CALM, *SHORT, lines=lines)
    assert [turn["system"] for turn in turns] == [None, None, None, "Be brief.", None]
    first, second, third, fourth, fifth = (turn["answers"]["a"]["text"] for turn in turns)
    assert first == third == fifth
    assert len({first, second, fourth}) == 3
    for words in ("> /zzz\n/system TEXT sets", "System prompt: Be brief.", "System prompt: none"):
        assert words in out, words
    assert "never" not in out


def test_base_and_adapters_answer_beside_others_as_alone(chat):
    def answers(*adapters, compare=()):
        named = [part for name in adapters for part in ("--adapter", name)]
        out, turns = chat(*named, *SHORT, *compare, lines=["Hi."])
        assert ("[b]\n" in out) == (len(turns[0]["answers"]) > 1)
        return {name: answer["text"] for name, answer in turns[0]["answers"].items()}

    every = answers(CALM, BOLD, compare=["--compare"])
    assert list(every) == ["base", "a", "b"]
    assert len(set(every.values())) == 3
    assert answers(CALM, BOLD) == {"a": every["a"], "b": every["b"]}
    assert answers(BOLD) == {"b": every["b"]}
    assert answers(BOLD, compare=["--compare"])["base"] == every["base"]


def test_a_seed_repeats_samples_and_the_likeliest_token_alone_is_greedy(chat):
    def text(*options):
        _, turns = chat("--adapter", CALM, "--prompt", "Hi.", "--max-new-tokens", "8", *options)
        return turns[0]["answers"]["a"]["text"]

    hot = ("--temperature", "5", "--seed")
    greedy = text()
    assert text(*hot, "1") == text(*hot, "1") != text(*hot, "2")
    for narrowed in (("--top-k", "1"), ("--min-p", "0.9999999"), ("--top-p", "1e-9")):
        assert text(*hot, "1", *narrowed) == greedy
    assert text(*hot, "1") != greedy


def test_an_answer_ends_before_a_stop_text(chat):
    told = ("--adapter", CALM, "--prompt", "Hi.", "--max-new-tokens", "8")
    whole = chat(*told)[1][0]["answers"]["a"]
    stop = whole["text"][4:7]
    out, turns = chat(*told, "--stop", "never there", "--stop", stop)
    cut = turns[0]["answers"]["a"]
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert (cut["ended"], cut["tokens"] < whole["tokens"]) == ("stop", True)
    assert out.startswith(cut["text"])


def test_what_cannot_be_sent_is_reported_and_the_conversation_continues(chat):
    lines = ["Bad <|im_end|> token", "word " * 600, "Hi."]
    out, turns = chat("--adapter", CALM, *SHORT, lines=lines)
    assert "Not sent: message 1 (user) contains the control token '<|im_end|>'" in out
    assert "the context of the base 512" in out
    assert [turn["prompt"] for turn in turns] == ["Hi."]


def test_ctrl_c_ends_an_answer_and_keeps_the_conversation(chat, monkeypatch):
    put = session.AnswerStream.put

    def interrupt(stream, value):
        put(stream, value)
        if len(stream.ids) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(session.AnswerStream, "put", interrupt)
    _, turns = chat("--adapter", CALM, lines=["Hi.", "And?"], code=130)
    assert len(turns) == 1
    assert turns[0]["answers"]["a"]["ended"] == "interrupted"
    assert turns[0]["answers"]["a"]["text"]
