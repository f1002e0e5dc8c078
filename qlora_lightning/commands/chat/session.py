"""A conversation with adapters on one base: who answers, how an answer streams, and the commands with a slash."""

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qlora_lightning.commands.adapter_config import BASE
from qlora_lightning.commands.chat import SETTINGS
from qlora_lightning.commands.options import write_json
from qlora_lightning.data.chat.labels import ChatRenderer
from qlora_lightning.data.chat.templates import choose_chat_template
from qlora_lightning.data.chat.tokenizer import load_tokenizer
from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import Message
from qlora_lightning.model.adapters.folder import add_named_adapter
from qlora_lightning.model.adapters.lora import ADAPTER, without_adapters
from qlora_lightning.model.generate import dense_weights
from qlora_lightning.model.opened_adapter import AdapterSource, find_adapter, open_adapter
from qlora_lightning.support.errors import UserError, nearest

Write = Callable[[str], object]
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes half a character to
_HELP = f"""/adapter NAME  let another adapter answer, or `base`; alone: list them
/compare       let the base answer beside the adapters, or stop that
/system TEXT   set the system prompt and start again; alone: without one
/set NAME X    set one of {", ".join(SETTINGS).replace("_", "-")}; alone: list them
/reset         start again
/quit          end (or Ctrl-D)"""
_COMMANDS = ("/adapter", "/compare", "/system", "/set", "/reset", "/help", "/quit")


def chat(options: argparse.Namespace, adapters: Mapping[str, Path]) -> None:
    """Load base and adapters, and converse as the options ask.

    Raises:
        UserError: an adapter cannot be used, or ``--prompt`` not be answered.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    session = Session(options, adapters)
    # on a CPU the base would be dequantized again for every token; a GPU multiplies one token by 4-bit weights
    on_cpu = next(session.model.parameters()).device.type == "cpu"
    try:
        with dense_weights(session.model) if on_cpu else contextlib.nullcontext():
            _converse(session, options.prompt)
    finally:
        if options.json is not None and session.turns:
            figures = {"adapters": session.folders, "sampling": session.settings, "turns": session.turns}
            write_json(options.json, figures)


def _converse(session: "Session", prompt: str | None) -> None:
    if prompt is not None:
        if not session.ask(prompt, named=False):
            raise UserError("--prompt was not answered, see above.")
    else:
        session.note(f"{session.speaker} answers. /help lists what else there is.")
    while prompt is None and (line := session.read()) is not None:
        if line.startswith("/"):
            if not session.obey(line):
                break
        elif line.strip():
            session.ask(line.strip())
        if session.was_interrupted and not sys.stdin.isatty():
            break
    if session.was_interrupted and (prompt is not None or not sys.stdin.isatty()):
        raise KeyboardInterrupt  # nobody types: Ctrl-C ends the conversation


class Session:
    """A conversation; if several answer, it continues with the answer of the speaker that was chosen.

    Args:
        options: of the command.
        adapters: folders by name.

    Raises:
        UserError: a folder cannot be used, or the adapters were trained on different bases.
    """

    def __init__(self, options: argparse.Namespace, adapters: Mapping[str, Path]) -> None:
        sources = {name: find_adapter(folder, options.base) for name, folder in adapters.items()}
        first = next(iter(sources.values()))
        opened = open_adapter(first)
        self.model: Any = opened.model
        self.peft_names: dict[str, str | None] = {}
        for number, (name, source) in enumerate(sources.items()):
            peft_name = f"adapter_{number}" if number else ADAPTER  # a user's name may hold what PEFT does not take
            self.peft_names[name] = peft_name
            if number:
                add_named_adapter(self.model, peft_name, source.folder, opened.identity)
        self.model.eval()
        self.renderers = {name: _make_renderer(source) for name, source in sources.items()}
        self.speaker = next(iter(adapters))
        self.peft_names[BASE], self.renderers[BASE] = None, self.renderers[self.speaker]
        self.folders = {name: str(folder) for name, folder in adapters.items()}
        self.context = int(self.model.get_base_model().config.max_position_embeddings)
        self.settings: dict[str, Any] = {name: getattr(options, name) for name in SETTINGS}
        self.compare: bool = options.compare
        trained = (first.identity.get("data") or {}).get("settings") or {}
        self.system: str | None = trained.get("system") if options.system is None else options.system
        self.console = Console(highlight=False)
        self.messages: list[Message] = []
        self.turns: list[dict[str, Any]] = []
        self.was_interrupted = False
        self._seed()

    def read(self) -> str | None:
        """Read the user's next line; None at the end. Piped lines are shown, so that a log can be read."""
        if sys.stdin.isatty():
            with contextlib.suppress(EOFError):
                return input("> ")
            self.console.print()
            return None
        line = sys.stdin.readline()
        if not line:
            return None
        self.note(f"> {line.rstrip()}")
        return line

    def note(self, text: str) -> None:
        """Print something that is no answer."""
        self.console.print(text, style="dim", markup=False, soft_wrap=True)

    def ask(self, text: str, named: bool = True) -> bool:
        """Answer a message, after the speaker's name if ``named``; return False, with a note, if that cannot be."""
        names = [BASE, *self.folders] if self.compare else [self.speaker]
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        try:
            prompts = {name: self.renderers[name].render_prompt([*system, *asked]) for name in names}
        except RowFault as fault:
            self.note(f"Not sent: {fault}.")
            return False
        longest = max(map(len, prompts.values()))
        if longest >= self.context:
            self.note(
                f"Not sent: the conversation is {longest:,} tokens long, and the context of the base {self.context:,}. "
                "/reset starts again."
            )
            return False
        answers: dict[str, Answer] = {}
        try:
            for name, prompt in prompts.items():
                heading = f"[{name}]\n" if self.compare else f"{name}: " if named else ""
                self.console.print(heading, style="bold", end="", markup=False)
                answers[name] = self._answer(name, prompt)
                self.console.print()
        except ValueError as error:  # transformers' own, of a setting that cannot be
            self.note(f"Not answered: {error}")
            return False
        self._keep(asked, answers)
        return True

    def _answer(self, name: str, prompt: list[int]) -> "Answer":
        settings = {**self.settings}
        settings["max_new_tokens"] = min(settings["max_new_tokens"], self.context - len(prompt))
        renderer, peft_name = self.renderers[name], self.peft_names[name]
        if peft_name is not None:
            self.model.set_adapter(peft_name, inference_mode=True)
        with without_adapters(self.model) if peft_name is None else contextlib.nullcontext():
            return stream_answer(
                self.model, prompt, renderer.tokenizer, sorted(renderer.stop_ids), settings, self._write
            )

    def _write(self, piece: str) -> None:
        self.console.file.write(piece)
        self.console.file.flush()

    def _keep(self, asked: list[Message], answers: dict[str, "Answer"]) -> None:
        self.was_interrupted = any(answer.ended == "interrupted" for answer in answers.values())
        self.messages = [*asked, {"role": "assistant", "content": answers[self.speaker].text}]
        self.turns.append(
            {
                "prompt": asked[-1]["content"],
                "system": self.system,
                "adapter": self.speaker,
                "answers": {name: asdict(answer) for name, answer in answers.items()},
            }
        )
        for name, answer in answers.items():
            if answer.ended == "length":
                self.note(f"({name} was cut after {answer.tokens} tokens: it had not stopped.)")

    # ---- commands ------------------------------------------------------------------------------------------------

    def obey(self, line: str) -> bool:
        """Do what a line that begins with a slash asks for; return False if it ends the conversation."""
        command, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if command == "/quit":
            return False
        if command == "/help":
            self.note(_HELP)
        elif command == "/reset":
            self._reset("Started again.")
        elif command == "/system":
            self.system = rest or None
            self._reset(f"System prompt: {rest}" if rest else "No system prompt.")
        elif command == "/compare":
            self.compare = not self.compare
            self.note("Base and adapters answer." if self.compare else f"{self.speaker} answers.")
        elif command == "/adapter":
            self._choose(rest)
        elif command == "/set":
            self._set(rest)
        else:
            self.note(f"There is no command {command}.{nearest(command, _COMMANDS) or ' See /help.'}")
        return True

    def _choose(self, name: str) -> None:
        if name and name not in self.renderers:
            self.note(f"There is no adapter {name!r}; there are {', '.join(self.renderers)}.")
            return
        self.speaker = name or self.speaker
        others = ", ".join(each for each in self.renderers if each != self.speaker)
        self.note(f"{self.speaker} answers; there are also: {others}.")

    def _set(self, text: str) -> None:
        typed, _, value = text.partition(" ")
        name = typed.replace("-", "_")
        if typed and name not in SETTINGS:
            self.note(f"There is no setting {typed!r}.{nearest(name, SETTINGS) or ' See /help.'}")
            return
        try:
            if name == "stop":
                self.settings[name] = [value] if value else []
            elif typed:
                self.settings[name] = SETTINGS[name].kind(value)
        except ValueError as error:
            self.note(f"{typed}: {error}.")
            return
        if name == "seed":
            self._seed()
        shown = (
            f"{name.replace('_', '-')} {value}" for name, value in self.settings.items() if value not in ([], None)
        )
        self.note(f"Set: {', '.join(shown)}.")

    def _seed(self) -> None:
        if self.settings["seed"] is not None:
            torch.manual_seed(self.settings["seed"])

    def _reset(self, text: str) -> None:
        self.messages = []
        self.note(text)


def _make_renderer(source: AdapterSource) -> ChatRenderer:
    has_own = any((source.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    folder = source.folder if has_own else source.base.folder
    return ChatRenderer(choose_chat_template(load_tokenizer(str(folder)), None))


# ---- one answer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What was answered.

    Attributes:
        text: without the stop token.
        tokens: new tokens, the stop token included.
        ended: ``stop`` at a stop token or text, ``length`` at the limit, ``interrupted`` by Ctrl-C.
        seconds: from the prompt to the last token.
    """

    text: str
    tokens: int
    ended: str
    seconds: float


class TokenStreamer(BaseStreamer):  # type: ignore[misc]  # transformers ships no types
    """Turns tokens into text as they come; transformers' own waits for the end of a word.

    Args:
        tokenizer: decodes.
        stop_ids: tokens that end an answer, and are not shown.
        write: is called with each new piece of text.
        stops: texts at which the answer ends, and which are not shown either.

    Attributes:
        met: whether one of them has come.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], write: Write, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop_ids, self._write, self._stops = tokenizer, stop_ids, write, stops
        self.met = False
        self._prompt_is_next = True
        self.ids: list[int] = []
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, and then token after token."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.ids += value.flatten().tolist()
        text = self._decode()
        if not text.endswith(_UNFINISHED):
            # the last characters may be the first ones of a stop
            sizes = (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
            self._show(text[: len(text) - (0 if self.met else max(sizes, default=0))])

    def end(self) -> None:
        """Show what is left: half a character at which an answer was cut, or what might have become a stop."""
        self._show(self._decode())

    def _decode(self) -> str:
        """Return the text up to the first stop."""
        ids = [token for token in self.ids if token not in self._stop_ids]
        text: str = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        ends = [end for stop in self._stops if (end := text.find(stop)) >= 0]
        self.met = bool(ends)
        return text[: min(ends)] if ends else text

    def _show(self, text: str) -> None:
        new = text[len(self.text) :]
        if new:
            self.text = text
            self._write(new)


class _StopAtText(StoppingCriteria):  # type: ignore[misc]  # transformers ships no types
    """Ends generation at a streamer's stop texts; the streamer gets each token first."""

    def __init__(self, streamer: TokenStreamer) -> None:
        self._streamer = streamer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._streamer.met, device=input_ids.device)


@torch.no_grad()
def stream_answer(
    model: Any,
    prompt: Sequence[int],
    tokenizer: Any,
    stop_ids: Sequence[int],
    settings: Mapping[str, Any],
    write: Write,
) -> Answer:
    """Continue a prompt until a stop token; Ctrl-C keeps what was answered until then.

    Raises:
        ValueError: transformers rejects one of the settings, which are those of ``SETTINGS``.
    """
    streamer = TokenStreamer(tokenizer, stop_ids, write, [stop for stop in settings["stop"] if stop])
    ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    sampling: dict[str, Any] = {"do_sample": settings["temperature"] != 0}
    for name in ("temperature", "top_k", "top_p", "min_p"):  # None, and no top_k of 50, which is transformers' default
        sampling[name] = settings[name] if sampling["do_sample"] else None
    sampling["min_p"] = sampling["min_p"] or None
    began, interrupted = time.monotonic(), False
    try:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **sampling,
            repetition_penalty=settings["repetition_penalty"],
            stopping_criteria=StoppingCriteriaList([_StopAtText(streamer)]),
            max_new_tokens=settings["max_new_tokens"],
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
            streamer=streamer,
        )
    except KeyboardInterrupt:
        interrupted = True
        streamer.end()
    stopped = streamer.met or (bool(streamer.ids) and streamer.ids[-1] in stop_ids)
    ended = "interrupted" if interrupted else "stop" if stopped else "length"
    return Answer(streamer.text, len(streamer.ids), ended, time.monotonic() - began)
