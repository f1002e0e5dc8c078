"""What a chat template makes of a conversation, as text, and where the answers are in it."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_lightning.data.chat.control_tokens import ControlTokens
from qlora_lightning.data.chat.templates import find_presets, find_reasoning_key
from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import Conversation, Message, Tools
from qlora_lightning.support.errors import UserError

REASONING = ("template", "keep", "drop")

_OURS = ("train", "untrained", "reasoning_content")
_TAG = r"\w*(?:think|reason)\w*"  # <think>, [THINK], <seed:think>, …
_INLINE = re.compile(rf"\s*<({_TAG})>(.*?)</\1>\s*", re.DOTALL)  # reasoning within the content
_OPENED = re.compile(rf"([<\[])({_TAG})([>\]])\s*$", re.IGNORECASE)  # by the generation prompt
# a block without content, and the line breaks that templates write behind it
_NO_REASONING = re.compile(rf"\s*(?:[<\[]{_TAG}[>\]]\s*)?[<\[]/{_TAG}[>\]]\n{{0,2}}", re.IGNORECASE)
_FEW = 8  # answers of one conversation that are all checked by rendering
_MARK = "An answer, to be found again."


class Answer(NamedTuple):
    """An assistant turn in a rendered text: what generation must produce.

    Attributes:
        message: its place in the conversation, from 0.
        start: its first character.
        end: the character behind its stop token.
        untrained: stretches of characters in it that are not trained.
    """

    message: int
    start: int
    end: int
    untrained: tuple[tuple[int, int], ...] = ()


class RenderedText(NamedTuple):
    """A text and the answers in it that are to be trained."""

    text: str
    answers: list[Answer]


class _Turn(NamedTuple):
    """An answer as generation sees it: the prompt, what follows it, and how much of that the template itself writes."""

    prompt: str
    said: str
    own: int


class ChatText:
    r"""Renders conversations as text with the chat template of one tokenizer.

    Answers are found by rendering what generation would see before each of them. Their reasoning is handed to the
    template under the name that it reads; to one that reads none, as ``<think>…</think>`` before the content. A block
    without reasoning that the template itself writes (Qwen3's ``<think>\n\n</think>\n\n``) belongs to the prompt.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.
        controls: its control tokens.
        reasoning: of earlier answers: ``template``: as the template renders them; ``keep``: as they were generated;
            ``drop``: left out.
    """

    def __init__(self, tokenizer: Any, controls: ControlTokens, reasoning: str = "template") -> None:
        self.tokenizer, self.controls, self.reasoning = tokenizer, controls, reasoning
        self._special_tokens = dict(getattr(tokenizer, "special_tokens_map", {}))
        self._reasoning_key = find_reasoning_key(getattr(tokenizer, "chat_template", None))

    def render(self, messages: Conversation, tools: Tools, wanted: Sequence[int]) -> list[RenderedText]:
        """Render a conversation to train on.

        Usually that is one text. A template that renders an answer otherwise once more turns follow (some strip its
        reasoning) gives a text of its own for that answer: the conversation up to there, as generation would see it.
        With ``reasoning: keep`` it is one text, in which each turn follows the answers as they were generated.

        Args:
            messages: the conversation, which ends in an answer.
            tools: what the row says may be called.
            wanted: places of the answers that are trained.

        Raises:
            RowFault: the template refuses the conversation, changes or leaves out a message, or writes an answer
                otherwise than generation would begin it.
            UserError: it writes no stop token after an answer.
        """
        messages = self.drop_earlier_reasoning(messages)
        text = self._apply(messages, tools)
        self._check_messages(messages, tools, text)
        keep = self.reasoning == "keep"
        spans = self._find_answers(messages, tools, text, find_places(messages) if keep else wanted, text)
        if keep and None in spans.values():
            return [self._splice(messages, tools, wanted)]
        together, apart = [], []
        for number in wanted:
            span = spans[number]
            if span:
                together.append(self._check_answer(messages[number], number, text, *span))
                continue
            turn = self._render_turn(messages[:number], messages[number], tools)
            if turn is None:
                raise _not_preserving(number)
            alone = turn.prompt + turn.said
            answer = self._check_answer(messages[number], number, alone, len(turn.prompt) + turn.own, len(alone))
            apart.append(RenderedText(alone, [answer]))
        return [*apart, RenderedText(text, together)] if together or not apart else apart

    def render_prompt(self, messages: Sequence[Message], tools: Tools) -> RenderedText:
        """Render what generation begins with; the earlier answers are those that training finds in the same text.

        Raises:
            RowFault: the template refuses the conversation, or changes or leaves out a message.
        """
        messages = self.drop_earlier_reasoning(messages, generation=True)
        text = self._apply(messages, tools, generation=True)
        self._check_messages(messages, tools, text)
        spans = self._find_answers(messages, tools, text, find_places(messages))
        if self.reasoning == "keep" and None in spans.values():
            return self._splice(messages, tools, (), generation=True)
        return RenderedText(text, [Answer(number, *span) for number, span in spans.items() if span])

    def write(self, messages: Conversation, tools: Tools, generation: bool = False) -> str:
        """Return the text of messages, or of a prompt, with the earlier answers as ``render`` and it have them."""
        text = self._apply(messages, tools, generation)
        if self.reasoning == "keep":
            places = find_places(messages)
            if None in self._find_answers(messages, tools, text, places, None if generation else text).values():
                return self._splice(messages, tools, (), generation).text
        return text

    def drop_earlier_reasoning(self, messages: Sequence[Message], generation: bool = False) -> Conversation:
        """Return messages without the reasoning of all answers but the last, if reasoning is dropped.

        Args:
            messages: a whole conversation.
            generation: whether an answer is to come, so that those of the messages are all earlier ones.
        """
        if self.reasoning != "drop":
            return list(messages)
        places = find_places(messages)
        earlier = set(places if generation else places[:-1])
        return [_without_reasoning(one) if number in earlier else one for number, one in enumerate(messages)]

    def _apply(self, messages: Sequence[Message], tools: Tools, generation: bool = False) -> str:
        plain = [self._as_read(message) for message in messages]
        try:
            return self._render_plain(plain, tools, generation)
        except TemplateError as error:
            calls = tools or any("tool_calls" in message for message in messages)
            advice = f". {self._advise_on_tools()}" if calls else ""
            raise RowFault(f"the chat template refuses the conversation: {error}{advice}") from error
        except Exception as error:  # a template is a program, and may fail in any way on what it does not expect
            raise RowFault(f"the chat template fails on the conversation: {type(error).__name__}: {error}") from error

    def _render_plain(self, plain: list[dict[str, Any]], tools: Tools, generation: bool) -> str:
        """Call the template; as ``apply_chat_template`` does, without what it does for other kinds of messages."""
        tokenizer = self.tokenizer
        if getattr(type(tokenizer), "apply_chat_template", None) is not PreTrainedTokenizerBase.apply_chat_template:
            return str(
                tokenizer.apply_chat_template(plain, tools=tools, tokenize=False, add_generation_prompt=generation)
            )
        template = tokenizer.get_chat_template(tools=tools)
        (text,), _ = render_jinja_template(
            [plain], tools=tools, chat_template=template, add_generation_prompt=generation, **self._special_tokens
        )
        return str(text)

    def _as_read(self, message: Message) -> dict[str, Any]:
        """Return a message as the template reads it: without marks, its reasoning where the template looks for it."""
        plain: dict[str, Any] = {key: value for key, value in message.items() if key not in _OURS}
        thought = message.get("reasoning_content")
        if thought and self._reasoning_key:
            plain[self._reasoning_key] = thought
        elif thought:
            plain["content"] = "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + message["content"]
        return plain

    def _render_turn(
        self, before: Sequence[Message], message: Message, tools: Tools, whole: str | None = None
    ) -> _Turn | None:
        """Render an answer as generation would see and continue it; None if the template does not let it.

        Args:
            before: the messages before it.
            message: the answer.
            tools: what may be called.
            whole: both rendered, if that is known.
        """
        prompt = self._apply(before, tools, generation=True)
        if whole is None:
            whole = self._apply([*before, message], tools)
        if whole.startswith(prompt):
            said = whole[len(prompt) :]
            return _Turn(prompt, said, _count_own(message, said))
        opened = _OPENED.search(prompt)
        if not opened or not whole.startswith(prompt[: opened.start()]):
            return None
        # as DeepSeek-R1: the prompt opens the reasoning, which the template never writes itself
        thought, _ = _split_reasoning(message)
        closing = f"\n{opened[1]}/{opened[2]}{opened[3]}\n\n"
        said = (thought or "").strip("\n") + closing + whole[opened.start() :].lstrip("\n")
        return _Turn(prompt, said, len(closing) if thought is None else 0)

    def _find_answers(
        self, messages: Conversation, tools: Tools, text: str, wanted: Sequence[int], whole: str | None = None
    ) -> dict[int, tuple[int, int] | None]:
        """Return where each answer starts in the text and where its turn ends; None if generation sees another text.

        A few answers are each checked by rendering: the text before an answer is the prompt that generation gets, and
        the text to its end the conversation so far. Of many, that would cost the square of their number: the first, the
        last and those at doubled distances are checked so, the others looked up by the header that a prompt ends with,
        which the text must hold exactly once for each answer. With ``reasoning: keep`` the first that generation sees
        otherwise is enough: then all are spliced.
        """
        checked = list(wanted)
        if len(wanted) > _FEW:
            checked = sorted(
                {wanted[0], wanted[-1], *(wanted[2**power] for power in range(len(wanted).bit_length() - 1))}
            )
        spans = {number: self._find_answer(messages, tools, number, text, whole) for number in checked}
        if len(checked) == len(wanted) or (self.reasoning == "keep" and None in spans.values()):
            return spans
        between = None if None in spans.values() else self._find_by_header(messages, tools, text)
        if between is None or any(span and between[number][0] != span[0] for number, span in spans.items()):
            return {number: self._find_answer(messages, tools, number, text, whole) for number in wanted}
        return {number: spans.get(number, between[number]) for number in wanted}

    def _find_answer(
        self, messages: Conversation, tools: Tools, number: int, text: str, whole: str | None
    ) -> tuple[int, int] | None:
        is_last = number == len(messages) - 1
        turn = self._render_turn(messages[:number], messages[number], tools, whole if is_last else None)
        if turn is None or not text.startswith(turn.prompt + turn.said):
            return None
        return len(turn.prompt) + turn.own, len(turn.prompt) + len(turn.said)

    def _find_by_header(self, messages: Conversation, tools: Tools, text: str) -> dict[int, tuple[int, int]] | None:
        """Return where the turn of each answer starts and ends, by what a prompt ends with; None if that is unclear."""
        places = find_places(messages)
        headers: dict[str, str] = {}  # by the role before the answer
        for number in places:
            before = messages[:number]
            if before[-1]["role"] not in headers:
                prompt = self._apply(before, tools, generation=True)
                header = prompt.removeprefix(self._apply(before, tools))
                last = max((found.start() for found in self.controls.pattern.finditer(prompt)), default=0)
                headers[before[-1]["role"]] = header or prompt[last:]
        wanted = [headers[messages[number - 1]["role"]] for number in places]
        found = list(re.finditer("|".join(map(re.escape, sorted(set(wanted), key=len, reverse=True))), text))
        if [header[0] for header in found] != wanted:
            return None
        starts = [header.end() for header in found]
        turns = zip(places, starts, [*starts[1:], len(text)], strict=True)
        return {number: (start + _count_own(messages[number], text[start:end]), end) for number, start, end in turns}

    def _splice(
        self, messages: Conversation, tools: Tools, wanted: Sequence[int], generation: bool = False
    ) -> RenderedText:
        """Render a conversation with each answer as it was generated, and what the template writes between them.

        Both are taken from the turns around: the nearest question before an answer, it and what follows.
        """
        places = find_places(messages)
        system = messages[:1] if messages[0]["role"] == "system" else []
        text, answers = self._apply(messages[: places[0]], tools, generation=True), list[Answer]()
        for number, following in zip(places, [*places[1:], len(messages)], strict=True):
            asked = next(at for at in range(number - 1, -1, -1) if messages[at]["role"] == "user")
            around = [*system, messages[asked]]
            turn = self._render_turn(around, messages[number], tools)
            if turn is None:
                raise _not_preserving(number)
            start = len(text)
            text += turn.said
            answer = self._check_answer(messages[number], number, text, start + turn.own, len(text))
            answers += [answer] if generation or number in wanted else []
            if following == len(messages) and not generation:
                break
            marked: Message = {"role": "assistant", "content": _MARK}
            rendered = self._apply([*around, marked, *messages[number + 1 : following]], tools, generation=True)
            between = rendered.rpartition(_MARK)[2]
            end = self.controls.pattern.search(between)  # the template's own end of that turn
            text = text[: answer.end] + between[end.end() if end else 0 :]
        return RenderedText(text, answers)

    def _check_answer(self, message: Message, number: int, text: str, start: int, limit: int) -> Answer:
        """Check what the turn of an answer says, and return it to the end of its stop token."""
        thought, content = _split_reasoning(message)
        calls = message.get("tool_calls", [])
        stop = self.controls.stop_pattern.search(text, start, limit)
        first: re.Match[str] | None = stop
        if not calls:  # some templates begin a call with a control token; behind an answer there is none but the stop
            at = text.rfind(content.strip(), start, stop.start() if stop else limit)
            first = self.controls.pattern.search(text, max(at + len(content.strip()), start), limit)
        if stop is None or first is None or first.start() != stop.start():
            known = ", ".join(repr(token) for token in self.controls.ids if self.controls.stop_pattern.fullmatch(token))
            raise UserError(
                "the model would never learn to stop: after an answer the chat template should write a stop token "
                f"({known or 'the tokenizer names none'}), but writes {first[0] if first else 'none'!r}. Use the "
                f"tokenizer and template that belong together. The turn as rendered: {text[start:limit]!r}"
            )
        said = text[start : stop.end()]
        parts = ((thought or "").strip(), content.strip(), *_leaves([call["function"] for call in calls]))
        if not all(part in said for part in parts):
            raise RowFault(f"the chat template changes the answer (message {number + 1}) to {said!r}")
        spans = message.get("untrained", ())
        at = text.rfind(message["content"].strip(), start, stop.start()) if spans else 0  # it may have been stripped
        if at < 0:
            raise RowFault(f"parts of message {number + 1} are not trained, but the chat template changes the message")
        at -= len(message["content"]) - len(message["content"].lstrip())
        return Answer(number, start, stop.end(), tuple((at + first, at + behind) for first, behind in spans))

    def _check_messages(self, messages: Sequence[Message], tools: Tools, text: str) -> None:
        """Refuse a template that leaves out or changes what is said or may be called, beside the answers."""
        for number, message in enumerate(messages, start=1):
            content = message["content"].strip()
            if message["role"] != "assistant" and content not in text and _as_json(content) not in text:
                raise RowFault(f"the chat template leaves out or changes message {number} ({message['role']})")
            if any(str(call["function"]["name"]) not in text for call in message.get("tool_calls", [])):
                raise self._lacks_tools(f"the tool calls of message {number}")
        for tool in tools or ():
            name = str(tool.get("function", tool).get("name"))
            if name not in text:
                raise self._lacks_tools(f"the tool {name!r}")
        if tools and self._apply(messages, None) == text:
            raise self._lacks_tools("the tools")

    def _lacks_tools(self, what: str) -> RowFault:
        return RowFault(f"the chat template leaves out {what}: it knows no tools. {self._advise_on_tools()}")

    def _advise_on_tools(self) -> str:
        fits = "chatml-tools" in find_presets(self.tokenizer)
        choice = "data.chat_template: chatml-tools" if fits else "data.chat_template with a .jinja file of your own"
        return f"Choose a template that does: {choice}"


def find_places(messages: Sequence[Message]) -> list[int]:
    """Return the places of the answers."""
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _not_preserving(number: int) -> RowFault:
    return RowFault(
        f"the chat template is not prefix-preserving: it renders message {number + 1} (assistant) otherwise than "
        "generation would see and continue it"
    )


def _split_reasoning(message: Message) -> tuple[str | None, str]:
    """Return the reasoning of an answer, None if it has none, and the rest of its content."""
    thought, content = message.get("reasoning_content"), message["content"]
    if thought:
        return thought, content
    inline = _INLINE.match(content)
    return (inline[2], content[inline.end() :]) if inline else (None, content)


def _without_reasoning(message: Message) -> Message:
    thought, content = _split_reasoning(message)
    if thought is None:
        return message
    shift = len(message["content"]) - len(content)
    plain: Message = {**message, "content": content}
    plain.pop("reasoning_content", None)
    if "untrained" in plain:
        plain["untrained"] = [(max(a - shift, 0), b - shift) for a, b in plain["untrained"] if b > shift]
    return plain


def _count_own(message: Message, said: str) -> int:
    """Count the characters of a block without reasoning that the template itself writes before an answer."""
    thought, _ = _split_reasoning(message)
    block = _NO_REASONING.match(said) if thought is None else None
    return block.end() if block else 0


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts and numbers in a value, as they are in JSON without quotes."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner) if key in ("name", "arguments") else (_as_json(str(key)), *_leaves(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield _as_json(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _as_json(text: str) -> str:
    """The text as a JSON string has it, without its quotes: how some templates write what a tool returned."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
