"""A conversation with adapters on one base: who answers, and how an answer streams."""

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList, StopStringCriteria, TextStreamer

from qlora_lightning.base.folder import load_tokenizer
from qlora_lightning.commands.adapter_config import BASE
from qlora_lightning.commands.options import write_output
from qlora_lightning.data.chat.labels import ChatRenderer
from qlora_lightning.data.chat.templates import choose_chat_template
from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import Message
from qlora_lightning.model.adapters.folder import add_named_adapter
from qlora_lightning.model.adapters.lora import ADAPTER, without_adapters
from qlora_lightning.model.answers import dense_weights, generate_answers
from qlora_lightning.model.load.build import find_adapter, open_adapter
from qlora_lightning.support.console import say, show_controls, terminal
from qlora_lightning.support.errors import UserError

_DECODING = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
_HELP = "/system TEXT sets the system prompt and starts again, /reset starts again, /quit or Ctrl-D ends."
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "stop", "seed")


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
            else:
                session.ask(options.prompt)
    except RowFault as fault:
        raise UserError(f"--prompt was not answered: {fault}.") from fault
    finally:
        if options.json is not None and session.turns:
            folders = {name: str(folder) for name, folder in adapters.items()}
            sampling = {name: getattr(options, name) for name in _SETTINGS}
            write_output(options.json, {"adapters": folders, "sampling": sampling, "turns": session.turns})


class AnswerStream(TextStreamer):  # type: ignore[misc]  # transformers ships no types
    """Prints an answer word by word, and keeps its tokens."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, **_DECODING)
        self.file = terminal().file
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.ids += value.tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.file.write(show_controls(text, keep="\n\t"))
        self.file.flush()


class Session:
    """A conversation, in which each adapter answers; it continues with the answer of the first."""

    def __init__(self, options: argparse.Namespace, adapters: Mapping[str, Path]) -> None:
        sources = {name: find_adapter(folder, options.base) for name, folder in adapters.items()}
        self.first, first = next(iter(sources.items()))
        opened, identity = open_adapter(first)
        self.model: Any = opened
        # a user's name may hold what PEFT does not take
        self.peft_names = {name: f"adapter_{number}" if number else ADAPTER for number, name in enumerate(sources)}
        for name in [*sources][1:]:
            add_named_adapter(self.model, self.peft_names[name], sources[name].folder, identity)
        self.model.eval()
        self.renderers = {
            name: ChatRenderer(choose_chat_template(load_tokenizer(str(source.tokenizer_folder)), None))
            for name, source in sources.items()
        }
        if options.compare:
            self.renderers = {BASE: self.renderers[self.first], **self.renderers}
        self.context = int(getattr(self.model.get_base_model().config, "max_position_embeddings", 1 << 20))
        self.options = options
        if options.seed is not None:
            torch.manual_seed(options.seed)
        trained = (first.identity.get("data") or {}).get("settings") or {}
        self.system: str | None = trained.get("system") if options.system is None else options.system
        self.messages: list[Message] = []
        self.turns: list[dict[str, Any]] = []
        self.is_typed: bool = options.prompt is None and sys.stdin.isatty()

    def converse(self) -> None:
        """Answer the user's lines until the last."""
        say(_HELP)
        while (line := self._read()) not in (None, "/quit"):
            command, _, rest = str(line).partition(" ")
            if command in ("/system", "/reset"):
                self.system = self.system if command == "/reset" else rest.strip() or None
                self.messages = []
                say(f"Started again. System prompt: {self.system or 'none'}")
            elif command.startswith("/"):
                say(_HELP)
            elif line:
                try:
                    self.ask(line)
                except RowFault as fault:
                    say(f"Not sent: {fault}.")

    def _read(self) -> str | None:
        """Read a line; None at the end. Piped lines are shown, so that a log can be read."""
        try:
            line = input("> " if self.is_typed else "").strip()
        except EOFError:
            return None
        if not self.is_typed:
            say(f"> {line}")
        return line

    def ask(self, text: str) -> None:
        """Answer a message, after each speaker's name if several answer.

        Raises:
            RowFault: it cannot be rendered, or is too long.
        """
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        prompts = {name: renderer.render_prompt([*system, *asked]) for name, renderer in self.renderers.items()}
        longest = max(map(len, prompts.values()))
        if longest >= self.context:
            raise RowFault(f"the conversation has {longest:,} tokens, and the context of the base {self.context:,}")
        answers = {}
        for name, prompt in prompts.items():
            if len(prompts) > 1:
                say(f"[{name}]")
            answers[name] = self._answer(name, prompt)
            say("")
        self.messages = [*asked, {"role": "assistant", "content": answers[self.first]["text"]}]
        self.turns.append({"prompt": text, "system": self.system, "answers": answers})
        for name, answer in answers.items():
            if answer["ended"] == "length":
                say(f"({name} was cut after {answer['tokens']} tokens: it had not stopped.)")
            if answer["ended"] == "interrupted" and not self.is_typed:
                raise KeyboardInterrupt  # which ends the conversation

    def _answer(self, name: str, prompt: list[int]) -> dict[str, Any]:
        """Continue a prompt until a stop token; Ctrl-C keeps what was answered until then."""
        renderer, options = self.renderers[name], self.options
        stop_ids, tokenizer = sorted(renderer.stop_ids), renderer.tokenizer
        stream, stops = AnswerStream(tokenizer), [stop for stop in options.stop if stop]
        sampling: dict[str, Any] = {"repetition_penalty": options.repetition_penalty}
        if options.temperature != 0:
            sampling |= {"do_sample": True, **{key: getattr(options, key) for key in _SETTINGS[:4]}}
        if stops:
            sampling["stopping_criteria"] = StoppingCriteriaList([StopStringCriteria(tokenizer, stops)])
        if name != BASE:
            self.model.set_adapter(self.peft_names[name], inference_mode=True)
        began, ended = time.monotonic(), "stop"
        most = min(options.max_new_tokens, self.context - len(prompt))
        try:
            with without_adapters(self.model) if name == BASE else contextlib.nullcontext():
                generate_answers(
                    self.model.get_base_model(),
                    [prompt],
                    stop_ids=stop_ids,
                    max_new_tokens=most,
                    streamer=stream,
                    **sampling,
                )
        except KeyboardInterrupt:
            stream.end()
            ended = "interrupted"
        except ValueError as error:  # transformers' own, of a setting that cannot be
            raise UserError(str(error)) from error
        said = [token for token in stream.ids if token not in stop_ids]
        # without control tokens, which a base may answer with: as text, they could not be sent with the next message
        text = whole = str(tokenizer.decode(said, **_DECODING))
        for stop in stops:
            text = text.partition(stop)[0]
        if len(said) == most and text == whole:
            ended = "length"
        return {"text": text, "tokens": len(stream.ids), "ended": ended, "seconds": time.monotonic() - began}
