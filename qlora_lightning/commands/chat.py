"""``qlora-lightning chat``: talk with an adapter, or ask it once."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_lightning.commands.adapter import name_adapters
from qlora_lightning.commands.options import OptionParser
from qlora_lightning.data.chat.renderer import ChatRenderer
from qlora_lightning.data.chat.templates import choose_chat_template
from qlora_lightning.data.rows.content import Message, RowFault
from qlora_lightning.evaluation import BASE
from qlora_lightning.sources.folders import load_tokenizer
from qlora_lightning.support.console import count_of, say, show_controls, terminal
from qlora_lightning.support.errors import UserError

_DESCRIPTION = """Chat with an adapter on its base. Prompts are rendered by the code that rendered them in training.

Answers stream word by word and end at the stop token. Decoding is greedy unless you set a temperature."""
_EPILOG = """examples:
  qlora-lightning chat --adapter runs/quickstart/adapter --prompt "Lunch with Zoe on Friday at 12:30 at Blue Room."
  qlora-lightning chat --adapter runs/quickstart/adapter --compare --prompt "Book a call with Ana, Monday 9:00."
  qlora-lightning chat --adapter runs/quickstart/adapter
  qlora-lightning chat --adapter calm=runs/a/adapter --adapter bold=runs/b/adapter --temperature 0.7 --seed 1

With several adapters or --compare, the answers are printed one below the other. The conversation continues with the
answer of the first adapter. Press Ctrl-C to stop an answer. Lines from a pipe are turns of one conversation."""


def main(argv: Sequence[str]) -> int:
    """Talk; return the exit code."""
    parser = OptionParser("chat", _DESCRIPTION, _EPILOG)
    add = parser.add_argument
    add("--adapter", required=True, action="append", metavar="[NAME=]DIR", help="adapter folder; may be repeated")
    add("--base", metavar="NAME", help="where to find the base, if it has moved since training")
    add("--prompt", metavar="TEXT", help="answer this one message and exit")
    add("--compare", action="store_true", help="also generate with the base alone")
    add("--system", metavar="TEXT", help="system prompt (default: data.system of the training)")
    add("--temperature", type=float, default=0.0, metavar="T", help="sampling temperature (default: 0, greedy)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the most likely tokens, up to probability P")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="maximum length of an answer (default: 512)")
    add("--seed", type=int, metavar="N", help="seed for sampling")
    options = parser.parse_args(argv)
    if options.top_p < 1 and not options.temperature:
        parser.error("--top-p has no effect without --temperature")
    Session(name_adapters(options.adapter), options).converse(options.prompt)
    return 0


class Session:
    """A conversation, in which each adapter answers (their folders by name); it continues with the first's answer."""

    def __init__(self, adapters: Mapping[str, Path], options: argparse.Namespace) -> None:
        import torch

        from qlora_lightning.model.adapters.inject import ADAPTER
        from qlora_lightning.model.adapters.trained import find_adapter, open_adapter
        from qlora_lightning.model.module import QLoRAModule

        sources = {name: find_adapter(folder, options.base) for name, folder in adapters.items()}
        self.first, first_source = next(iter(sources.items()))
        self.module = open_adapter(first_source, QLoRAModule)
        # PEFT does not take every name of a user
        self.peft_names = {name: f"adapter_{index}" if index else ADAPTER for index, name in enumerate(sources)}
        for name in [*sources][1:]:
            self.module.add_adapter(self.peft_names[name], sources[name].folder)
        self.renderers = {
            name: ChatRenderer(choose_chat_template(load_tokenizer(str(source.tokenizer_folder)), None))
            for name, source in sources.items()
        }
        if options.compare:
            self.renderers = {BASE: self.renderers[self.first], **self.renderers}
        self.context = int(getattr(self.module.causal_lm.config, "max_position_embeddings", 1 << 20))
        self.max_new_tokens = options.max_new_tokens
        self.sampling: dict[str, Any] = {}
        if options.temperature != 0:
            self.sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        if options.seed is not None:
            torch.manual_seed(options.seed)
        system = first_source.data_settings.get("system") if options.system is None else options.system
        self.system: str | None = system
        self.messages: list[Message] = []
        # at a terminal the conversation continues after Ctrl-C
        self.is_typed = options.prompt is None and sys.stdin.isatty()

    def converse(self, prompt: str | None = None) -> None:
        """Answer one prompt, or each of the user's lines."""
        for text in self._read_lines() if prompt is None else [prompt]:
            try:
                self.ask(text)
            except RowFault as fault:
                if prompt is not None:
                    raise UserError(f"--prompt was not answered: {fault}.") from fault
                say(f"Not sent: {fault}.")

    def _read_lines(self) -> Iterator[str]:
        """Yield the user's lines until the last; those of a pipe are shown: a log can be read."""
        say("/quit or Ctrl-D ends.")
        with contextlib.suppress(EOFError):
            while (line := input("> " if self.is_typed else "").strip()) != "/quit":
                if not self.is_typed:
                    say(f"> {line}")
                if line:
                    yield line

    def ask(self, text: str) -> None:
        """Answer a message; if several answer, each after its name.

        Raises:
            RowFault: it cannot be rendered, or is too long.
        """
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system is not None else []
        prompts = {name: renderer.render_prompt([*system, *messages]) for name, renderer in self.renderers.items()}
        n_tokens = max(map(len, prompts.values()))
        if n_tokens >= self.context:
            raise RowFault(f"the conversation has {n_tokens:,} tokens, and the context of the base {self.context:,}")
        answers = {}
        for name, prompt in prompts.items():
            if len(prompts) > 1:
                say(f"[{name}]")
            answers[name] = self._answer(name, prompt)
        self.messages = [*messages, {"role": "assistant", "content": answers[self.first]}]

    def _answer(self, name: str, prompt: list[int]) -> str:
        """Continue a prompt until a stop token; Ctrl-C at a terminal keeps what was answered until then."""
        from qlora_lightning.model.adapters.inject import with_adapter

        renderer = self.renderers[name]
        stream = _open_stream(renderer.tokenizer)
        if name != BASE:
            self.module.model.set_adapter(self.peft_names[name], inference_mode=True)
        limit = min(self.max_new_tokens, self.context - len(prompt))
        try:
            with with_adapter(self.module.model, None) if name == BASE else contextlib.nullcontext():
                stop_ids = sorted(renderer.stop_ids)
                (token_ids,) = self.module.answer([prompt], stop_ids, limit, streamer=stream, **self.sampling)
        except KeyboardInterrupt:
            stream.end()
            if not self.is_typed:
                raise  # which ends the command
            say("")
            return str(stream.text)
        cut = f"\n({name} was cut after {count_of(limit, 'token')}: it had not stopped.)"
        say("" if len(token_ids) < limit else cut)
        return str(stream.text)


def _open_stream(tokenizer: Any) -> Any:
    """Return a streamer that prints an answer word by word, without control tokens, and keeps it as ``text``."""
    from transformers import TextStreamer

    class AnswerStream(TextStreamer):  # type: ignore[misc]  # transformers ships no types
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            terminal().file.write(show_controls(text, keep="\n\t"))
            terminal().file.flush()

    return AnswerStream(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
