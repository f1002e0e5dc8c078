"""What a chat template makes of a conversation, as text, and where the answers are in it."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import Conversation, Message, Tools, without_marks

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Answer(NamedTuple):
    """An assistant turn in a rendered text.

    Attributes:
        message: its place in the conversation, from 0.
        start: its first character, after the header that generation would begin with.
        end: the character behind it.
        parts: what the turn must say: the message's content, and the names of the tools that it calls.
        calls: whether it calls tools.
        marked: whether the template itself marks this stretch, so that what it leaves out is not trained.
    """

    message: int
    start: int
    end: int
    parts: tuple[str, ...]
    calls: bool = False
    marked: bool = False


class RenderedText(NamedTuple):
    """A text and the answers in it that are to be trained."""

    text: str
    answers: list[Answer]


class ChatText:
    """Renders conversations as text with the chat template of one tokenizer.

    Where the template has ``{% generation %}`` markers, they say where answers stand. Hardly any model's template has:
    else answers are found by rendering what generation would see before each of them.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        template = tokenizer.get_chat_template() if hasattr(tokenizer, "get_chat_template") else ""
        self.has_markers = bool(_MARKER.search(template))

    def render(self, messages: Conversation, tools: Tools, wanted: Sequence[int]) -> list[RenderedText]:
        """Render a conversation to train on.

        Usually that is one text. A template that renders an answer otherwise once more turns follow (some strip its
        reasoning) gives a text of its own for that answer: the conversation up to there, as generation would see it.

        Args:
            messages: the conversation, which ends in an answer.
            tools: what the row says may be called.
            wanted: places of the answers that are trained.

        Raises:
            RowFault: the template refuses the conversation, changes or leaves out a message, or writes an answer
                otherwise than generation would begin it.
        """
        text, spans = self._apply_marked(messages, tools) if self.has_markers else (self.apply(messages, tools), [])
        self._check_messages(messages, tools, text)
        places = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self.has_markers and len(spans) != len(places):
            raise RowFault(
                f"the chat template marks {len(spans)} answers with {{% generation %}}, the conversation has "
                f"{len(places)}"
            )
        marked = dict(zip(places, spans, strict=False))
        together, apart = [], []
        for number in wanted:
            answer = self._find(messages, tools, number, text, marked.get(number))
            if answer is None:
                apart.append(self._render_apart(messages[: number + 1], tools))
            else:
                together.append(answer)
        return [*apart, RenderedText(text, together)] if together or not apart else apart

    def _render_apart(self, messages: Conversation, tools: Tools) -> RenderedText:
        """Render a conversation for its last answer alone."""
        number = len(messages) - 1
        text, spans = self._apply_marked(messages, tools) if self.has_markers else (self.apply(messages, tools), [None])
        answer = self._find(messages, tools, number, text, spans[-1] if spans else None)
        if answer is None:
            raise RowFault(
                f"the chat template is not prefix-preserving: it renders message {number + 1} (assistant) "
                "otherwise than generation would see and continue it"
            )
        return RenderedText(text, [answer])

    def render_prompt(self, messages: Sequence[Message], tools: Tools) -> RenderedText:
        """Render what generation begins with; the earlier answers are those that training finds in the same text.

        Raises:
            RowFault: the template refuses the conversation, or changes or leaves out a message.
        """
        text = self.apply(messages, tools, generation=True)
        self._check_messages(messages, tools, text)
        places = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        found = [self._find(messages, tools, number, text, None) for number in places]
        return RenderedText(text, [answer for answer in found if answer is not None])

    def apply(self, messages: Sequence[Message], tools: Tools = None, generation: bool = False) -> str:
        """Apply the template as it is.

        Raises:
            RowFault: it refuses the conversation.
        """
        plain = without_marks(messages)
        try:
            return str(
                self.tokenizer.apply_chat_template(plain, tools=tools, tokenize=False, add_generation_prompt=generation)
            )
        except TemplateError as error:
            raise RowFault(f"the chat template refuses the conversation: {error}") from error
        except Exception as error:  # a template is a program, and may fail in any way on what it does not expect
            raise RowFault(f"the chat template fails on the conversation: {type(error).__name__}: {error}") from error

    def _apply_marked(self, messages: Conversation, tools: Tools) -> tuple[str, list[tuple[int, int] | None]]:
        self.apply(messages, tools)  # its faults are worded there
        (text,), (spans,) = render_jinja_template(
            [without_marks(messages)],
            tools=tools,
            chat_template=self.tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return text, spans

    def _find(
        self, messages: Sequence[Message], tools: Tools, number: int, text: str, marked: tuple[int, int] | None
    ) -> Answer | None:
        """Find the answer that is ``messages[number]`` in the text; None where it is not what generation would see."""
        is_last = number == len(messages) - 1
        prompt = self.apply(messages[:number], tools, generation=True)
        turns = text if is_last else self.apply(messages[: number + 1], tools)
        if not (turns.startswith(prompt) and text.startswith(turns)):
            return None
        start, end = marked or (len(prompt), len(turns))
        if start != len(prompt):
            raise RowFault(
                f"the chat template marks message {number + 1} with {{% generation %}} elsewhere than generation begins"
            )
        calls = messages[number].get("tool_calls", [])
        parts = (messages[number]["content"].strip(), *_leaves([call["function"] for call in calls]))
        return Answer(number, start, end, parts, bool(calls), marked is not None)

    def _check_messages(self, messages: Sequence[Message], tools: Tools, text: str) -> None:
        """Refuse a template that leaves out or changes what a message other than an answer says."""
        for number, message in enumerate(messages, start=1):
            content = message["content"].strip()
            if message["role"] != "assistant" and content not in text and _as_json(content) not in text:
                raise RowFault(f"the chat template leaves out or changes message {number} ({message['role']})")
            for call in message.get("tool_calls", []):
                if str(call["function"]["name"]) not in text:
                    raise RowFault(
                        f"the chat template leaves out the tool calls of message {number}: it knows no tools"
                    )
        if not tools:
            return
        names = [str(tool.get("function", tool).get("name")) for tool in tools]
        hidden = [name for name in names if name not in text]
        if hidden or self.apply(messages, None) == text:
            raise RowFault(f"the chat template leaves out the tool {(hidden or names)[0]!r}: it knows no tools")


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts and numbers in a value, as they stand in JSON without quotes."""
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
