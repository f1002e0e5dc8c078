"""Samples longer than ``max_length``: shortened, dropped, or split into pieces."""

from bisect import bisect_left
from collections.abc import Sequence

from qlora_lightning.data.chat.chat_text import Tools
from qlora_lightning.data.chat.renderer import IGNORED, ChatRenderer, Rendered
from qlora_lightning.data.rows.formats import Conversation
from qlora_lightning.support.errors import UserError

TOO_LONG = ("truncate", "drop", "split")
_FEWEST = 2  # characters that a shortened message keeps
_GUESSES = 8  # renderings that look for how much of a message fits


def check_length_settings(max_length: int, too_long: str) -> None:
    """Refuse settings that no sample could be fitted to.

    Raises:
        UserError: if ``max_length`` is less than 2 or ``too_long`` is none of the three words.
    """
    if max_length < 2:
        raise UserError(f"max_length: expected at least 2 (a token and the one that it predicts), found {max_length}.")
    if too_long not in TOO_LONG:
        raise UserError(f"too_long: expected {', '.join(TOO_LONG)}, found {too_long!r}.")


def shorten(
    renderer: ChatRenderer, conversation: Conversation, tools: Tools, answers: Sequence[int], max_length: int
) -> Rendered | None:
    """Render a conversation in at most ``max_length`` tokens, and never so that turns are welded together.

    Whole turns go first, the oldest before the others; the system message and the tools stay, and what remains begins
    with a user turn. If the last exchange alone is too long, its longest message that is not trained loses its middle,
    the system message only if no other helps. An exchange of many tool calls that is still too long ends with an
    earlier answer. If an answer does not fit beside a quarter of ``max_length`` (or beside its whole prompt, if that is
    shorter), it loses its end, and with it the stop token: none is trained where the text does not end.

    Args:
        renderer: renders it.
        conversation: its messages.
        tools: what the row says may be called.
        answers: places of the trained answers that the sample shall keep; messages after the last of them are left out.
        max_length: tokens, at least 2.

    Returns:
        The sample, or None if what must stay leaves no room for a labelled token.

    Raises:
        RowFault: the template refuses what remains.
    """
    if not answers:
        return None
    limit = max_length
    while limit > 1:
        messages, trained, fits = _Shortening(renderer, conversation, tools, answers, limit).choose()
        ids, labels = renderer.render_answers(messages, tools, trained)
        needed = 1 + max(at for at, label in enumerate(labels) if label in renderer.stop_ids)
        if not fits or needed <= max_length:
            ids, labels = ids[:max_length], labels[:max_length]
            return Rendered(ids, labels) if any(label != IGNORED for label in labels[1:]) else None
        limit -= needed - max_length  # an answer that begins with a line break has a token more than was counted
    return None


class _Shortening:
    """The choice of what remains of one conversation, made with few renderings: by bisection."""

    def __init__(
        self, renderer: ChatRenderer, conversation: Conversation, tools: Tools, answers: Sequence[int], limit: int
    ) -> None:
        self.renderer, self.tools, self.limit = renderer, tools, limit
        self.conversation, self.answers = conversation, answers
        self.system = conversation[:1] if conversation[0]["role"] == "system" else []

    def choose(self) -> tuple[Conversation, list[int], bool]:
        """Return what remains, the places of its trained answers, and whether it is counted to fit."""
        last = self.answers[-1]
        users = [number for number, message in enumerate(self.conversation[:last]) if message["role"] == "user"]
        found = bisect_left(users, True, key=lambda start: self._count(self._between(start, last)) <= self.limit)
        if found < len(users):
            start, end, fits = users[found], last, True
            messages = self._between(start, end)
        else:
            start = users[-1]
            ends = [number for number in self.answers if number > start]
            fitting = bisect_left(ends, True, key=lambda end: not self._can_fit(start, end))
            end = ends[max(fitting - 1, 0)]
            messages, fits = self._cut_one_message(start, end)
        return messages, self._trained(start, end), fits

    def _between(self, start: int, end: int) -> Conversation:
        return [*self.system, *self.conversation[start : end + 1]]

    def _trained(self, start: int, end: int) -> list[int]:
        return [number - start + len(self.system) for number in self.answers if start < number <= end]

    def _count(self, messages: Conversation) -> int:
        return self.renderer.count_tokens(messages, self.tools)

    def _can_fit(self, start: int, end: int) -> bool:
        return min(self._fewest_tokens(start, end).values()) <= self.limit

    def _fewest_tokens(self, start: int, end: int) -> dict[int, int]:
        """Return how few tokens remain if one message loses nearly all: the longest one, or the system message."""
        messages, trained = self._between(start, end), self._trained(start, end)
        others = [at for at in range(len(self.system), len(messages)) if at not in trained]
        longest = max(others, key=lambda at: len(messages[at]["content"]))
        candidates = (longest, *range(len(self.system)))
        return {at: self._count(self._cut(messages, at, _FEWEST)) for at in candidates}

    def _cut_one_message(self, start: int, end: int) -> tuple[Conversation, bool]:
        messages = self._between(start, end)
        total = self._count(messages)
        prompt = self.renderer.count_tokens(messages[:-1], self.tools, generation=True)
        most = max(self.limit, min(prompt, _quarter(self.limit)) + total - prompt)  # more if the answer loses its end
        if total > most:
            fewest = self._fewest_tokens(start, end)
            at = next((at for at, tokens in fewest.items() if tokens <= most), min(fewest, key=fewest.__getitem__))
            messages, total = self._fill(messages, at, fewest[at], most, total)
        return messages, total <= self.limit

    def _fill(self, messages: Conversation, at: int, fewest: int, most: int, total: int) -> tuple[Conversation, int]:
        """Keep as much of one message as ``most`` tokens hold; each guess takes its tokens for evenly long."""
        few, many = min(_FEWEST, len(messages[at]["content"])), len(messages[at]["content"])
        for _ in range(_GUESSES):
            if many - few <= 1 or fewest >= most - most // 100:
                break
            guess = few + int((many - few) * (most - fewest) / (total - fewest))
            guess = min(max(guess, few + 1), many - 1)
            tokens = self._count(self._cut(messages, at, guess))
            if tokens <= most:
                few, fewest = guess, tokens
            else:
                many, total = guess, tokens
        return self._cut(messages, at, few), fewest

    def _cut(self, messages: Conversation, at: int, kept: int) -> Conversation:
        """Take the middle out of a message, so that about ``kept`` characters remain and form no control token."""
        content = messages[at]["content"]
        while True:
            tail = kept // 2
            text = content[: kept - tail] + content[max(len(content) - tail, kept - tail) :]
            if kept <= 1 or not self.renderer.find_control(text):
                return [*messages[:at], {**messages[at], "content": text}, *messages[at + 1 :]]
            kept -= 1


def split_up(sample: Rendered, max_length: int) -> list[Rendered]:
    """Cut a sample into pieces of at most ``max_length`` tokens that train each labelled token exactly once.

    Each later piece begins with the tokens that ended the one before, a quarter of ``max_length``, as context without
    labels. A piece without a labelled token is left out, so that there may be none.

    Args:
        sample: one that is too long.
        max_length: tokens, at least 2.
    """
    ids, labels = sample
    context = _quarter(max_length)
    pieces = []
    for start in range(0, max(len(ids) - context, 1), max_length - context):
        end = start + max_length
        seen = context if start else 1  # nothing predicts the very first token
        own = [IGNORED] * seen + labels[start + seen : end]
        if any(label != IGNORED for label in own):
            pieces.append(Rendered(ids[start:end], own))
    return pieces


def _quarter(max_length: int) -> int:
    return -(-max_length // 4)
