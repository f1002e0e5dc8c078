"""A conversation with adapters on one base: who answers, how an answer streams, and the commands with a slash."""

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from qlora_lightning.base.folder import load_tokenizer
from qlora_lightning.commands.adapter_config import BASE
from qlora_lightning.commands.chat import add_settings
from qlora_lightning.commands.options import OptionParser, write_output
from qlora_lightning.data.chat.labels import ChatRenderer
from qlora_lightning.data.chat.templates import choose_chat_template
from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import Message
from qlora_lightning.model.adapters.folder import add_named_adapter
from qlora_lightning.model.adapters.lora import ADAPTER, without_adapters
from qlora_lightning.model.answers import dense_weights, generate_answers
from qlora_lightning.model.load.build import find_adapter, open_adapter
from qlora_lightning.support.console import show_controls, terminal
from qlora_lightning.support.errors import UserError

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes half a character to
_HELP = """/adapter NAME  let another adapter answer, or `base`; alone: list them
/compare       let the base answer beside the adapters, or stop that
/system TEXT   set the system prompt and start again; alone: without one
/set NAME X    set temperature or another option of sampling; alone: list them
/reset         start again
/quit          end (or Ctrl-D)"""


def chat(options: argparse.Namespace, adapters: Mapping[str, Path]) -> None:
    """Load base and adapters, and converse as the options ask."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    session = Session(options, adapters)
    # on a CPU the base would be dequantized again for every token; a GPU multiplies one token by 4-bit weights
    on_cpu = next(session.model.parameters()).device.type == "cpu"
    try:
        with dense_weights(session.model) if on_cpu else contextlib.nullcontext():
            if options.prompt is None:
                session.converse()
            elif not session.ask(options.prompt, named=False):
                raise UserError("--prompt was not answered, see above.")
    finally:
        if options.json is not None and session.turns:
            folders = {name: str(folder) for name, folder in adapters.items()}
            write_output(options.json, {"adapters": folders, "sampling": session.settings, "turns": session.turns})


class ChatAnswer(NamedTuple):
    """What was answered: ``ended`` is ``stop`` (at a stop token or text), ``length`` or ``interrupted``."""

    text: str
    tokens: int  # the stop token included
    ended: str
    seconds: float


class AnswerStream(StoppingCriteria):  # type: ignore[misc]  # transformers ships no types
    """Shows an answer token by token, and ends it at a stop; transformers' own streamers wait for the end of a word.

    Args:
        tokenizer: decodes.
        start: number of tokens of the prompt.
        stop_ids: tokens that end an answer, and are not shown.
        stops: texts that do.
        write: is called with each new piece of text.
    """

    def __init__(
        self, tokenizer: Any, start: int, stop_ids: Sequence[int], stops: Sequence[str], write: Callable[[str], object]
    ) -> None:
        self._tokenizer, self._start, self._stop_ids, self._write = tokenizer, start, stop_ids, write
        self._stops = [stop for stop in stops if stop]
        self.ids: list[int] = []
        self.text = ""
        self.has_stopped = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.ids = input_ids[0, self._start :].tolist()
        self.show()
        return torch.full((len(input_ids),), self.has_stopped, device=input_ids.device)

    def show(self, is_whole: bool = False) -> None:
        """Write what is new, but for half a character or what may become a stop, unless the answer is whole."""
        ids = [token for token in self.ids if token not in self._stop_ids]
        # without control tokens, which a base may answer with: as text, they could not be sent with the next message
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ends = [end for stop in self._stops if (end := text.find(stop)) >= 0]
        self.has_stopped = bool(ends) or len(ids) < len(self.ids)
        if ends:
            text = text[: min(ends)]
        elif not is_whole:
            if text.endswith(_UNFINISHED):
                return
            sizes = (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
            text = text[: len(text) - max(sizes, default=0)]
        new, self.text = text[len(self.text) :], text
        self._write(new)


class Session:
    """A conversation; if several answer, it continues with the answer of the speaker that was chosen.

    Args:
        options: of the command.
        adapters: folders by name.
    """

    def __init__(self, options: argparse.Namespace, adapters: Mapping[str, Path]) -> None:
        sources = {name: find_adapter(folder, options.base) for name, folder in adapters.items()}
        self.speaker, first = next(iter(sources.items()))
        opened, identity = open_adapter(first)
        self.model: Any = opened
        self.peft_names: dict[str, str | None] = {self.speaker: ADAPTER}
        for name in [*sources][1:]:  # a user's name may hold what PEFT does not take
            peft_name = self.peft_names[name] = f"adapter_{len(self.peft_names)}"
            add_named_adapter(self.model, peft_name, sources[name].folder, identity)
        self.model.eval()
        self.renderers = {
            name: ChatRenderer(choose_chat_template(load_tokenizer(str(source.tokenizer_folder)), None))
            for name, source in sources.items()
        }
        self.peft_names[BASE], self.renderers[BASE] = None, self.renderers[self.speaker]
        self.context = int(self.model.get_base_model().config.max_position_embeddings)
        self.setting_parser = add_settings(OptionParser("chat", "", ""))
        names = vars(self.setting_parser.parse_args([]))
        self.settings: dict[str, Any] = {name: getattr(options, name) for name in names}
        if options.seed is not None:
            torch.manual_seed(options.seed)
        self.compare: bool = options.compare
        trained = (first.identity.get("data") or {}).get("settings") or {}
        self.system: str | None = trained.get("system") if options.system is None else options.system
        self.console = terminal()
        self.messages: list[Message] = []
        self.turns: list[dict[str, Any]] = []
        self.is_typed: bool = options.prompt is None and sys.stdin.isatty()

    def converse(self) -> None:
        """Answer the user's lines until the last."""
        self._note(f"{self.speaker} answers. /help lists what else there is.")
        while (line := self._read()) is not None:
            if line.startswith("/"):
                if not self._obey(line):
                    return
            elif line:
                self.ask(line)

    def _read(self) -> str | None:
        """Read a line; None at the end. Piped lines are shown, so that a log can be read."""
        if self.is_typed:
            with contextlib.suppress(EOFError):
                return input("> ").strip()
            self.console.print()
            return None
        line = sys.stdin.readline()
        if not line:
            return None
        self._note(f"> {line.rstrip()}")
        return line.strip()

    def _note(self, text: str) -> None:
        """Print something that is no answer."""
        self.console.print(text, style="dim", markup=False, soft_wrap=True)

    def ask(self, text: str, named: bool = True) -> bool:
        """Answer a message, after the speaker's name if ``named``; return False, with a note, if that cannot be."""
        names = [BASE, *(name for name in self.renderers if name != BASE)] if self.compare else [self.speaker]
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        answers: dict[str, ChatAnswer] = {}
        try:
            prompts = {name: self.renderers[name].render_prompt([*system, *asked]) for name in names}
            longest = max(map(len, prompts.values()))
            if longest >= self.context:
                self._note(
                    f"Not sent: the conversation is {longest:,} tokens long, and the context of the base "
                    f"{self.context:,}. /reset starts again."
                )
                return False
            for name, prompt in prompts.items():
                heading = f"[{name}]\n" if self.compare else f"{name}: " if named else ""
                self.console.print(heading, style="bold", end="", markup=False)
                answers[name] = self._answer(name, prompt)
                self.console.print()
        except RowFault as fault:
            self._note(f"Not sent: {fault}.")
            return False
        except ValueError as error:  # transformers' own, of a setting that cannot be
            self._note(f"Not answered: {error}")
            return False
        self.messages = [*asked, {"role": "assistant", "content": answers[self.speaker].text}]
        shown = {name: answer._asdict() for name, answer in answers.items()}
        self.turns.append({"prompt": text, "system": self.system, "adapter": self.speaker, "answers": shown})
        for name, answer in answers.items():
            if answer.ended == "length":
                self._note(f"({name} was cut after {answer.tokens} tokens: it had not stopped.)")
            if answer.ended == "interrupted" and not self.is_typed:
                raise KeyboardInterrupt  # which ends the conversation
        return True

    def _answer(self, name: str, prompt: list[int]) -> ChatAnswer:
        """Continue a prompt until a stop token; Ctrl-C keeps what was answered until then.

        Raises:
            ValueError: transformers rejects one of the settings.
        """
        renderer, peft_name, settings = self.renderers[name], self.peft_names[name], self.settings
        stop_ids = sorted(renderer.stop_ids)
        stream = AnswerStream(renderer.tokenizer, len(prompt), stop_ids, settings["stop"], self._write)
        sampling: dict[str, Any] = {"repetition_penalty": settings["repetition_penalty"]}
        if settings["temperature"] != 0:
            names = "temperature", "top_k", "top_p", "min_p"
            sampling |= {"do_sample": True, **{name: settings[name] for name in names}}
        if peft_name is not None:
            self.model.set_adapter(peft_name, inference_mode=True)
        began, interrupted = time.monotonic(), False
        try:
            with without_adapters(self.model) if peft_name is None else contextlib.nullcontext():
                generate_answers(
                    self.model.get_base_model(),
                    [prompt],
                    stop_ids=stop_ids,
                    max_new_tokens=min(settings["max_new_tokens"], self.context - len(prompt)),
                    stopping_criteria=StoppingCriteriaList([stream]),
                    **sampling,
                )
        except KeyboardInterrupt:
            interrupted = True
        stream.show(is_whole=True)
        ended = "interrupted" if interrupted else "stop" if stream.has_stopped else "length"
        return ChatAnswer(stream.text, len(stream.ids), ended, time.monotonic() - began)

    def _write(self, text: str) -> None:
        self.console.file.write(show_controls(text, keep="\n\t"))
        self.console.file.flush()

    # ---- commands ------------------------------------------------------------------------------------------------

    def _obey(self, line: str) -> bool:
        """Do what a line that begins with a slash asks for; return False if it ends the conversation."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        match command:
            case "/quit":
                return False
            case "/help":
                self._note(_HELP)
            case "/reset":
                self._reset("Started again.")
            case "/system":
                self.system = rest or None
                self._reset(f"System prompt: {rest}" if rest else "No system prompt.")
            case "/compare":
                self.compare = not self.compare
                self._note("Base and adapters answer." if self.compare else f"{self.speaker} answers.")
            case "/adapter":
                self._choose(rest)
            case "/set":
                self._set(rest)
            case _:
                self._note(f"There is no command {command}. See /help.")
        return True

    def _choose(self, name: str) -> None:
        if name and name not in self.renderers:
            self._note(f"There is no adapter {name!r}; there are {', '.join(self.renderers)}.")
            return
        self.speaker = name or self.speaker
        others = ", ".join(each for each in self.renderers if each != self.speaker)
        self._note(f"{self.speaker} answers; there are also: {others}.")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name:
            key, option = name.replace("-", "_"), name.replace("_", "-")
            try:
                self.settings[key] = getattr(self.setting_parser.parse_args([f"--{option}={value}"]), key)
            except UserError as error:
                self._note(str(error))
                return
            if key == "seed":
                torch.manual_seed(self.settings[key])
        shown = (f"{key.replace('_', '-')} {value}" for key, value in self.settings.items() if value not in ([], None))
        self._note(f"Set: {', '.join(shown)}.")

    def _reset(self, text: str) -> None:
        self.messages = []
        self._note(text)
