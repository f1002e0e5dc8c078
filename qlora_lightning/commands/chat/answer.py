"""One answer, token by token."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes half a character to


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0."""

    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True)
class Answer:
    """What was said.

    Attributes:
        text: Without the stop token.
        tokens: New tokens, the stop token included.
        ended: ``stop`` at a stop token, ``length`` at the limit, ``interrupted`` by Ctrl-C.
        seconds: From the prompt to the last token.
    """

    text: str
    tokens: int
    ended: str
    seconds: float


class TokenStreamer(BaseStreamer):  # type: ignore[misc]  # transformers ships no types
    """Turns tokens into text as they come; transformers' own waits for the end of a word.

    Args:
        tokenizer: Decodes.
        stop_ids: Tokens that end an answer, and are not shown.
        write: Is handed each new piece of text.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], write: Callable[[str], object]) -> None:
        self._tokenizer, self._stop_ids, self._write = tokenizer, frozenset(stop_ids), write
        self._prompt_is_next = True
        self.ids: list[int] = []
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, and then token after token."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.ids += value.flatten().tolist()
        said = [token for token in self.ids if token not in self._stop_ids]
        text = self._tokenizer.decode(said, clean_up_tokenization_spaces=False)
        if not text.endswith(_UNFINISHED):
            self._show(text)

    def end(self) -> None:
        """Show what is left: half a character at which an answer was cut."""
        said = [token for token in self.ids if token not in self._stop_ids]
        self._show(self._tokenizer.decode(said, clean_up_tokenization_spaces=False))

    def _show(self, text: str) -> None:
        new, self.text = text[len(self.text) :], text
        if new:
            self._write(new)


@torch.no_grad()
def stream_answer(
    model: Any,
    prompt: Sequence[int],
    tokenizer: Any,
    stop_ids: Sequence[int],
    sampling: Sampling,
    write: Callable[[str], object],
) -> Answer:
    """Continue a prompt until a stop token; Ctrl-C keeps what was said until then.

    Args:
        model: A causal language model of transformers or PEFT, in ``eval()``.
        prompt: Token ids.
        tokenizer: Decodes the answer.
        stop_ids: Tokens that end it.
        sampling: How tokens are chosen.
        write: Is handed each new piece of text.
    """
    streamer = TokenStreamer(tokenizer, stop_ids, write)
    ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    samples = sampling.temperature > 0
    began, interrupted = time.monotonic(), False
    try:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=samples,
            temperature=sampling.temperature if samples else None,
            top_p=sampling.top_p if samples else None,
            top_k=0 if samples else None,  # transformers' default would cut at 50 unasked
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
            streamer=streamer,
        )
    except KeyboardInterrupt:
        interrupted = True
        streamer.end()
    stopped = bool(streamer.ids) and streamer.ids[-1] in stop_ids
    ended = "interrupted" if interrupted else "stop" if stopped else "length"
    return Answer(streamer.text, len(streamer.ids), ended, time.monotonic() - began)
