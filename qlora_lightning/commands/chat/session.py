"""A conversation: what was said, who answers, and the commands that begin with a slash."""

import difflib
from dataclasses import asdict, replace
from typing import Any

import torch

from qlora_lightning.commands.chat.answer import Answer, stream_answer
from qlora_lightning.commands.chat.arguments import BASE, is_text
from qlora_lightning.commands.chat.sampling import Sampling, setting_names
from qlora_lightning.commands.chat.screen import Screen, Write
from qlora_lightning.commands.chat.speakers import Speaker, Speakers
from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import Message
from qlora_lightning.support.errors import UserError

_HELP = f"""/adapter NAME  let another adapter answer, or `base`; alone: who there is
/compare       let the base answer beside the adapters, or no longer
/system TEXT   set the system prompt and begin anew; alone: without one
/set NAME X    set one of {", ".join(setting_names())}; alone: what is set
/reset         begin anew
/quit          end (or Ctrl-D)"""


class Session:
    """Keeps a conversation.

    Where several answer, the conversation goes on with the answer of the one who was chosen.

    Args:
        speakers: Who can answer.
        sampling: How.
        screen: Where it is shown.
        system: System prompt; ``None``: that of the rows in training.
        compare: Whether base and adapters answer side by side.
    """

    def __init__(
        self, speakers: Speakers, sampling: Sampling, screen: Screen, system: str | None, compare: bool
    ) -> None:
        self.speakers, self.sampling, self.screen, self.compare = speakers, sampling, screen, compare
        self.speaker: Speaker = next(iter(speakers.by_name.values()))
        self.system = self.speaker.system if system is None else system
        self.messages: list[Message] = []
        self.turns: list[dict[str, Any]] = []
        self.was_interrupted = False
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)

    def say(self, text: str, named: bool = True) -> bool:
        """Answer a message; False where it cannot be rendered or is too long, which is told.

        Args:
            text: Of the user.
            named: Whether an answer begins with the name of who gives it.
        """
        if not is_text(text):
            self.screen.tell("Not sent: the message holds bytes that are no UTF-8.")
            return False
        answering = list(self.speakers.by_name.values()) if self.compare else [self.speaker]
        if self.compare:  # the base first
            answering.sort(key=lambda speaker: speaker.name != BASE)
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        try:
            prompts = {speaker.name: speaker.renderer.render_prompt([*system, *asked]) for speaker in answering}
        except RowFault as fault:
            self.screen.tell(f"Not sent: {fault}.")
            return False
        longest = max(map(len, prompts.values()))
        if longest >= self.speakers.longest:
            self.screen.tell(
                f"Not sent: the conversation is {longest:,} tokens long, and the base looks back on "
                f"{self.speakers.longest:,}. /reset begins anew."
            )
            return False
        answers: dict[str, Answer] = {}
        if self.compare:
            with self.screen.several([speaker.name for speaker in answering]) as writer:
                for speaker in answering:
                    answers[speaker.name] = self._answer(speaker, prompts[speaker.name], writer(speaker.name))
                    if not self.screen.console.is_terminal:
                        self.screen.console.print()
        else:
            with self.screen.one(self.speaker.name if named else None) as write:
                answers[self.speaker.name] = self._answer(self.speaker, prompts[self.speaker.name], write)
        self._keep(asked, answers)
        return True

    def obey(self, line: str) -> bool:
        """Do what a line that begins with a slash asks for; False where it ends the conversation."""
        command, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if command in ("/quit", "/exit"):
            return False
        if command == "/help":
            self.screen.tell(_HELP)
        elif command == "/reset":
            self._reset("Begun anew.")
        elif not is_text(rest):
            self.screen.tell(f"{command}: that holds bytes that are no UTF-8.")
        elif command == "/system":
            self.system = rest or None
            self._reset(f"System prompt: {rest}" if rest else "No system prompt.")
        elif command == "/compare":
            self.compare = not self.compare
            self.screen.tell("Base and adapters answer." if self.compare else f"{self.speaker.name} answers.")
        elif command == "/adapter":
            self._choose(rest)
        elif command == "/set":
            self._set(rest)
        else:
            known = ("/adapter", "/compare", "/system", "/set", "/reset", "/quit")
            near = difflib.get_close_matches(command, known, n=1)
            self.screen.tell(
                f"There is no command {command}. " + (f"Did you mean {near[0]}?" if near else "See /help.")
            )
        return True

    def as_json(self) -> dict[str, Any]:
        """Give the conversation as plain values."""
        return {"adapters": self.speakers.folders, "sampling": asdict(self.sampling), "turns": self.turns}

    def _answer(self, speaker: Speaker, prompt: list[int], write: Write) -> Answer:
        room = min(self.sampling.max_new_tokens, self.speakers.longest - len(prompt))
        sampling = replace(self.sampling, max_new_tokens=room)
        renderer = speaker.renderer
        with self.speakers.speaking(speaker) as model:
            return stream_answer(model, prompt, renderer.tokenizer, sorted(renderer.stop_ids), sampling, write)

    def _keep(self, asked: list[Message], answers: dict[str, Answer]) -> None:
        own = answers[self.speaker.name]
        self.was_interrupted = any(answer.ended == "interrupted" for answer in answers.values())
        self.messages = [*asked, {"role": "assistant", "content": own.text}]
        self.turns.append(
            {
                "prompt": asked[-1]["content"],
                "system": self.system,
                "adapter": self.speaker.name,
                "answers": {name: asdict(answer) for name, answer in answers.items()},
            }
        )
        for name, answer in answers.items():
            if answer.ended == "length":
                self.screen.tell(f"({name} was cut after {answer.tokens} tokens: it had not stopped.)")

    def _set(self, text: str) -> None:
        try:
            self.sampling = self.sampling.changed(text) if text else self.sampling
        except UserError as error:
            self.screen.tell(str(error))
            return
        if text.startswith("seed") and self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed)
        self.screen.tell(f"Set: {self.sampling}.")

    def _choose(self, name: str) -> None:
        known = self.speakers.by_name
        if name in known:
            self.speaker = known[name]
        elif name:
            self.screen.tell(f"There is no adapter {name!r}; there are {', '.join(known)}.")
            return
        others = ", ".join(each for each in known if each != self.speaker.name)
        self.screen.tell(f"{self.speaker.name} answers; there are also: {others}.")

    def _reset(self, words: str) -> None:
        self.messages = []
        self.screen.tell(words)
