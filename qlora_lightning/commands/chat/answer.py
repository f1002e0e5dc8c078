"""One answer, token by token."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qlora_lightning.commands.chat.sampling import Sampling

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes half a character to


@dataclass(frozen=True)
class Answer:
    """What was said.

    Attributes:
        text: Without the stop token.
        tokens: New tokens, the stop token included.
        ended: ``stop`` at a stop token or text, ``length`` at the limit, ``interrupted`` by Ctrl-C.
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
        stops: Texts at which the answer ends, and which are not shown either.

    Attributes:
        met: Whether one of them has come.
    """

    def __init__(
        self, tokenizer: Any, stop_ids: Sequence[int], write: Callable[[str], object], stops: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self._stop_ids, self._write, self._stops = tokenizer, frozenset(stop_ids), write, stops
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
        said = [token for token in self.ids if token not in self._stop_ids]
        text = self._tokenizer.decode(said, clean_up_tokenization_spaces=False)
        if not text.endswith(_UNFINISHED):
            text = self._cut(text)
            self._show(text[: len(text) - (0 if self.met else self._count_held_back(text))])

    def end(self) -> None:
        """Show what is left: half a character at which an answer was cut, or what might have become a stop."""
        said = [token for token in self.ids if token not in self._stop_ids]
        self._show(self._cut(self._tokenizer.decode(said, clean_up_tokenization_spaces=False)))

    def _cut(self, text: str) -> str:
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.met = bool(places)
        return text[: min(places)] if places else text

    def _count_held_back(self, text: str) -> int:
        """Count the last characters that may be the first ones of a stop."""
        sizes = (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        return max(sizes, default=0)

    def _show(self, text: str) -> None:
        new = text[len(self.text) :]
        if new:
            self.text = text
            self._write(new)


class StopAtText(StoppingCriteria):  # type: ignore[misc]  # transformers ships no types
    """Ends generation where a streamer has met a stop.

    Args:
        streamer: Is handed each token first.
    """

    def __init__(self, streamer: TokenStreamer) -> None:
        self._streamer = streamer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Say of each sequence whether it ends."""
        return torch.full((len(input_ids),), self._streamer.met, device=input_ids.device)


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
    streamer = TokenStreamer(tokenizer, stop_ids, write, sampling.stop)
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
            top_k=sampling.top_k if samples else None,  # transformers' default would cut at 50 unasked
            min_p=sampling.min_p or None if samples else None,
            repetition_penalty=sampling.repetition_penalty,
            stopping_criteria=StoppingCriteriaList([StopAtText(streamer)]),
            max_new_tokens=sampling.max_new_tokens,
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
