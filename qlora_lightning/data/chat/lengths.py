"""Samples longer than ``max_length``: shortened, dropped, or split into pieces."""

from bisect import bisect_left
from collections.abc import Sequence

from qlora_lightning.data.chat.labels import IGNORED, ChatRenderer, Rendered
from qlora_lightning.data.rows.conversation import Conversation, Tools

_FEWEST = 2  # characters that the longest message keeps
_GUESSES = 8  # renderings that look for how much of it fits


def shorten(
    renderer: ChatRenderer, conversation: Conversation, tools: Tools, answers: Sequence[int], max_length: int
) -> Rendered | None:
    """Render a conversation in at most ``max_length`` tokens, and never so that turns are welded together.

    Whole turns go first, the oldest before the others; the system message and the tools stay, and what remains begins
    with a user turn. If the last exchange alone is too long, its longest message that is not trained loses its middle,
    and so does a system message that is more than twice as long as what that one keeps. An exchange of many tool calls
    that is still too long ends with an earlier answer. If an answer does not fit beside a quarter of ``max_length`` (or
    beside its whole prompt, if that is shorter), it loses its end, and with it the stop token: none is trained where
    the text does not end.

    ``answers`` are the places of the trained ones that the sample keeps; messages after the last of them are left
    out. If what must stay leaves no room for a labelled token, there is no sample.

    Raises:
        RowFault: the template refuses what remains.
    """
    if not answers:
        return None
    conversation, limit = renderer.drop_earlier_reasoning(conversation), max_length
    while limit > 1:
        messages, trained, fits = _Shortening(renderer, conversation, tools, answers, limit).choose()
        ids, labels = renderer.render_answers(messages, tools, trained)
        stops = (at for at, label in enumerate(labels, start=1) if label in renderer.stop_ids)
        needed = max(stops, default=len(labels))
        if not fits or needed <= max_length:
            ids, labels = ids[:max_length], labels[:max_length]
            return Rendered(ids, labels) if any(label != IGNORED for label in labels[1:]) else None
        limit -= needed - max_length  # an answer that begins with a line break has a token more than was counted
    return None


class _Shortening:
    """The choice of what remains of one conversation, made with few renderings: the whole of a long one costs most."""

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
        start = users[-1]
        tokens = self._count(self._between(start, last))
        if tokens <= self.limit:
            older = bisect_left(users[:-1], True, key=lambda at: self._count(self._between(at, last)) <= self.limit)
            return self._between(users[older], last), self._trained(users[older], last), True
        ends = [number for number in self.answers if number > start]
        end = ends[bisect_left(ends[1:], True, key=lambda at: self._count(self._cut(start, at, _FEWEST)) > self.limit)]
        messages, fits = self._fill(start, end, tokens if end == last else self._count(self._between(start, end)))
        return messages, self._trained(start, end), fits

    def _between(self, start: int, end: int) -> Conversation:
        return [*self.system, *self.conversation[start : end + 1]]

    def _trained(self, start: int, end: int) -> list[int]:
        return [number - start + len(self.system) for number in self.answers if start < number <= end]

    def _count(self, messages: Conversation, generation: bool = False) -> int:
        return self.renderer.count_tokens(messages, self.tools, generation)

    def _fill(self, start: int, end: int, tokens: int) -> tuple[Conversation, bool]:
        """Keep as much of an exchange of so many tokens as fits, and say whether all of its answer does."""
        messages, few = self._cut(start, end, _FEWEST), _FEWEST
        fewest = self._count(messages[:-1], generation=True)
        answer = self._count(messages) - fewest
        room = max(self.limit - answer, _quarter(self.limit))  # more than is left if the answer loses its end
        whole, most = self._between(start, end), tokens - answer
        if most <= room:
            return whole, tokens <= self.limit
        many = max(-(-len(whole[at]["content"]) // share) for at, share in self._shares(start, end).items())
        for number in range(_GUESSES):
            if many - few <= 1 or fewest >= room - room // 100:
                break
            # as if tokens were evenly long; where they are not, every third guess halves what is left
            part = (room - room // 200 - fewest) / (most - fewest) if number % 3 < 2 else 0.5
            guess = min(max(few + int((many - few) * part), few + 1), many - 1)
            cut = self._cut(start, end, guess)
            found = self._count(cut[:-1], generation=True)
            if found <= room:
                messages, few, fewest = cut, guess, found
            else:
                many, most = guess, found
        return messages, fewest + answer <= self.limit

    def _shares(self, start: int, end: int) -> dict[int, int]:
        """Return the messages that may be cut, and what each keeps: the system's twice as much as the longest other."""
        messages, trained = self._between(start, end), self._trained(start, end)
        others = [at for at in range(len(self.system), len(messages)) if at not in trained]
        longest = max(others, key=lambda at: len(messages[at]["content"]))
        return {longest: 1, **dict.fromkeys(range(len(self.system)), 2)}

    def _cut(self, start: int, end: int, kept: int) -> Conversation:
        """Take the middle out of messages, so that about so many characters remain, times their shares."""
        messages = self._between(start, end)
        for at, share in self._shares(start, end).items():
            messages[at] = {**messages[at], "content": self._without_middle(messages[at]["content"], share * kept)}
        return messages

    def _without_middle(self, content: str, kept: int) -> str:
        """Return the beginning and end of a text, about so many characters, which form no control token."""
        while True:
            tail = kept // 2
            text = content[: kept - tail] + content[max(len(content) - tail, kept - tail) :]
            if kept <= 1 or not self.renderer.find_control(text):
                return text
            kept -= 1


def split_up(sample: Rendered, max_length: int, context: int | None = None) -> list[Rendered]:
    """Cut a sample into pieces of at most ``max_length`` tokens that train each labelled token exactly once.

    Each later piece begins with the tokens that ended the one before as context without labels. A piece without a
    labelled token is left out, so that there may be none. ``context`` tokens are repeated, at least 1, without which
    the first one could not be predicted: 1 for documents, else a quarter of ``max_length``.
    """
    ids, labels = sample
    context = context or _quarter(max_length)
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
