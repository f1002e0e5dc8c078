"""``chat`` as a user runs it, on a tiny base."""

import io

import pytest
from transformers import TextStreamer

from qlora_lightning import InstructionDataModule, QLoRAModule
from qlora_lightning.cli import main
from tests.adapters import make_run
from tests.commands.conftest import help_examples

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
    """Run the command with lines of a pipe; return what it printed behind its help."""
    monkeypatch.chdir(place)

    def chat(*arguments, lines=(), code=0):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", *arguments]) == code
        out = capsys.readouterr().out
        return out.partition("Ctrl-D ends.\n")[2] or out

    return chat


@pytest.mark.parametrize("arguments", help_examples("chat"), ids=" ".join)
def test_the_examples_of_help_run(arguments, chat):
    assert "was cut after 4 tokens" in chat(*arguments[1:], *SHORT, lines=["Hello."])


def test_one_prompt_prints_the_answer_that_greedy_generation_gives(chat, tiny_base):
    out = chat("--adapter", CALM, "--prompt", "Count to 3.", *SHORT)
    data = InstructionDataModule(tokenizer=CALM)
    module = QLoRAModule(str(tiny_base), adapter=CALM, compute_dtype="fp32")
    module.configure_model()
    prompt = data.renderer.render_prompt([{"role": "user", "content": "Count to 3."}])
    (expected,) = module.answer([prompt], data.stop_ids, max_new_tokens=4)
    assert out == f"{data.tokenizer.decode(expected)}\n(a was cut after 4 tokens: it had not stopped.)\n"


def test_a_conversation_continues_until_it_is_ended(chat):
    lines = ["Hi.", "Hi.", "/quit", "never"]
    _, *parts = chat("--adapter", CALM, *SHORT, lines=lines[:2]).split("> Hi.\n")
    first, second = (part.partition("\n(a was")[0] for part in parts)
    assert first != second
    assert "never" not in chat("--adapter", CALM, *SHORT, lines=lines)
    assert first not in chat("--adapter", CALM, *SHORT, "--system", "Be brief.", lines=lines[:1])


def test_base_and_adapters_answer_beside_others_as_alone(chat):
    def answers(*adapters, compare=()):
        named = [part for name in adapters for part in ("--adapter", name)]
        out = chat(*named, *SHORT, *compare, lines=["Hi."]).removeprefix("> Hi.\n")
        return [part.partition("\n(")[0] for part in out.split("]\n")]

    _, base, calm, bold = answers(CALM, BOLD, compare=["--compare"])
    assert len({base, calm, bold}) == 3
    assert answers(CALM, BOLD)[1:] == [calm, bold]
    assert answers(BOLD) == [bold]
    assert answers(BOLD, compare=["--compare"])[1] == base


@pytest.mark.slow
def test_a_seed_repeats_samples_and_the_likeliest_token_alone_is_greedy(chat):
    def text(*options):
        return chat("--adapter", CALM, "--max-new-tokens", "8", *options, lines=["Hi."])

    hot = ("--temperature", "5", "--seed")
    greedy = text()
    assert text(*hot, "1") == text(*hot, "1") != text(*hot, "2")
    assert text(*hot, "1", "--top-p", "1e-9") == greedy != text(*hot, "1")


def test_what_cannot_be_sent_is_reported_and_the_conversation_continues(chat):
    lines = ["Bad <|im_end|> token", "word " * 600, "Hi."]
    out = chat("--adapter", CALM, *SHORT, lines=lines)
    assert "Not sent: message 1 (user) contains the control token '<|im_end|>'" in out
    assert "the context of the base 512" in out
    assert "was cut after 4 tokens" in out.partition("> Hi.")[2]


def test_ctrl_c_ends_an_answer_and_what_was_answered_is_kept(chat, monkeypatch):
    put, tokens = TextStreamer.put, []

    def interrupt(stream, token):
        put(stream, token)
        tokens.append(token)
        if len(tokens) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(TextStreamer, "put", interrupt)
    assert len(chat("--adapter", CALM, lines=["Hi.", "And?"], code=130).split("> ")) == 2  # no second turn
