"""What a chat template makes of a conversation, as text, and where the answers are in it."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from qlora_lightning.data.chat.templates import find_reasoning_key
from qlora_lightning.data.chat.tokenizer import ControlTokens
from qlora_lightning.data.rows.bad_rows import RowFault
from qlora_lightning.data.rows.conversation import Conversation, Message, Tools
from qlora_lightning.support.errors import UserError

_OURS = ("train", "reasoning_content")
_TAG = r"\w*(?:think|reason)\w*"  # <think>, [THINK], <seed:think>, …
_INLINE = re.compile(rf"\s*<({_TAG})>(.*?)</\1>\s*", re.DOTALL)  # reasoning within the content
_OPENED = re.compile(rf"([<\[])({_TAG})([>\]])\s*$", re.IGNORECASE)  # by the generation prompt
# a block without content, and the line breaks that templates write behind it
_NO_REASONING = re.compile(rf"\s*(?:[<\[]{_TAG}[>\]]\s*)?[<\[]/{_TAG}[>\]]\n{{0,2}}", re.IGNORECASE)
_ADVICE = "Choose a template that knows tools: data.chat_template: chatml (if the base has ChatML's tokens)"


class AnswerSpan(NamedTuple):
    """An assistant turn in a rendered text: what generation must produce."""

    message: int  # its index in the conversation
    start: int
    end: int  # the character behind its stop token


class RenderedText(NamedTuple):
    """A text and the answers in it that are to be trained."""

    text: str
    answers: list[AnswerSpan]


class ChatText:
    r"""Renders conversations as text with the chat template of one tokenizer.

    An answer is what the template writes behind the prompt that generation would see. Its reasoning is handed to the
    template under the name that it reads; to one that reads none, as ``<think>…</think>`` before the content. A block
    without reasoning that the template itself writes (Qwen3's ``<think>\n\n</think>\n\n``) belongs to the prompt.
    """

    def __init__(self, tokenizer: Any, controls: ControlTokens, reasoning: str = "template") -> None:
        self.tokenizer, self.controls, self.reasoning = tokenizer, controls, reasoning
        self._reasoning_key = find_reasoning_key(getattr(tokenizer, "chat_template", None))

    def render(self, messages: Conversation, tools: Tools, wanted: Sequence[int]) -> list[RenderedText]:
        """Render a conversation to train on.

        Usually that is one text. A template that renders an answer otherwise once more turns follow (some strip its
        reasoning) gives a text of its own for that answer: the conversation up to there, as generation would see it.

        ``wanted`` are the indices of the answers that are trained; the last message is an answer.

        Raises:
            RowFault: the template refuses the conversation, changes or leaves out a message, or writes an answer
                otherwise than generation would begin it.
            UserError: it writes no stop token after an answer.
        """
        messages = self.drop_earlier_reasoning(messages)
        text = self._apply(messages, tools)
        _check_messages(messages, text)
        if tools and self._apply(messages, None) == text:
            raise RowFault(f"the chat template leaves out the tools. {_ADVICE}")
        apart, together = list[RenderedText](), list[AnswerSpan]()
        for number in wanted:
            found = self._find_span(messages, tools, number, text)
            if found is None:
                raise RowFault(
                    f"the chat template is not prefix-preserving: it renders message {number + 1} (assistant) "
                    "otherwise than generation would see and continue it"
                )
            answer = self._check_answer(messages[number], *found)
            if found[0] == text:
                together.append(answer)
            else:
                apart.append(RenderedText(found[0], [answer]))
        return [*apart, RenderedText(text, together)] if together or not apart else apart

    def render_prompt(self, messages: Sequence[Message], tools: Tools) -> RenderedText:
        """Render what generation begins with; the earlier answers are those that training finds in the same text."""
        messages = self.drop_earlier_reasoning(messages, generation=True)
        text = self._apply(messages, tools, generation=True)
        _check_messages(messages, text)
        found = [self._find_span(messages, tools, number, text) for number in answer_indices(messages)]
        return RenderedText(text, [each[1] for each in found if each and each[0] == text])

    def drop_earlier_reasoning(self, messages: Sequence[Message], generation: bool = False) -> Conversation:
        """Return messages without the reasoning of earlier answers, if it is dropped; all are for generation."""
        if self.reasoning != "drop":
            return list(messages)
        answers = answer_indices(messages)
        earlier = set(answers if generation else answers[:-1])
        return [_without_reasoning(one) if number in earlier else one for number, one in enumerate(messages)]

    def _apply(self, messages: Sequence[Message], tools: Tools, generation: bool = False) -> str:
        plain = [self._as_read(message) for message in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(plain, tools=tools, tokenize=False, add_generation_prompt=generation)
            )
        except Exception as error:  # a template is a program, and may fail in any way on what it does not expect
            advice = f". {_ADVICE}" if tools or any("tool_calls" in message for message in messages) else ""
            reason = f"{type(error).__name__}: {error}{advice}"
            raise RowFault(f"the chat template cannot render the conversation: {reason}") from error

    def _as_read(self, message: Message) -> dict[str, Any]:
        """Return a message as the template reads it: without marks, its reasoning where the template looks for it."""
        plain: dict[str, Any] = {key: value for key, value in message.items() if key not in _OURS}
        thought = message.get("reasoning_content")
        if thought and self._reasoning_key:
            plain[self._reasoning_key] = thought
        elif thought:
            plain["content"] = "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + message["content"]
        return plain

    def _find_span(self, messages: Conversation, tools: Tools, number: int, text: str) -> tuple[str, AnswerSpan] | None:
        """Return the text, or else that of the conversation that an answer ends, with the span of its turn there.

        None if generation could not begin it so.
        """
        prompt = self._apply(messages[:number], tools, generation=True)
        whole = text if number + 1 == len(messages) else self._apply(messages[: number + 1], tools)
        turn = _find_turn(messages[number], prompt, whole)
        if turn is None:
            return None
        generated, block_end = turn
        alone = prompt + generated
        span = AnswerSpan(number, len(prompt) + block_end, len(alone))
        return text if text.startswith(alone) else alone, span

    def _check_answer(self, message: Message, text: str, span: AnswerSpan) -> AnswerSpan:
        """Check that a turn holds its answer, and return it to the end of its stop token."""
        number, start, limit = span
        stop = self.controls.stop_pattern.search(text, start, limit)
        if stop is None:
            raise UserError(
                "the model would never learn to stop: the chat template writes no token after an answer at which "
                "generation stops. Use the tokenizer and template that belong together. The turn as rendered: "
                f"{text[start:limit]!r}"
            )
        turn = text[start : stop.end()]
        thought, content = _split_reasoning(message)
        calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", [])]
        if not all(part in turn for part in ((thought or "").strip(), content.strip(), *_leaves(calls))):
            raise RowFault(f"the chat template changes the answer (message {number + 1}) to {turn!r}")
        return AnswerSpan(number, start, stop.end())


def answer_indices(messages: Sequence[Message]) -> list[int]:
    """Return the indices of the answers."""
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _find_turn(message: Message, prompt: str, whole: str) -> tuple[str, int] | None:
    """Return what generation must produce behind a prompt to give the whole; None if the template does not let it.

    With it comes the length of the block without reasoning at its beginning that the template itself writes.
    """
    thought, _ = _split_reasoning(message)
    if whole.startswith(prompt):
        generated = whole[len(prompt) :]
        block = _NO_REASONING.match(generated) if thought is None else None
        return generated, block.end() if block else 0
    opened = _OPENED.search(prompt)
    if not opened or not whole.startswith(prompt[: opened.start()]):
        return None
    # as DeepSeek-R1: the prompt opens the reasoning, which the template never writes itself
    closing = f"\n{opened[1]}/{opened[2]}{opened[3]}\n\n"
    generated = (thought or "").strip("\n") + closing + whole[opened.start() :].lstrip("\n")
    return generated, len(closing) if thought is None else 0


def _check_messages(messages: Sequence[Message], text: str) -> None:
    """Reject a template that leaves out or changes messages, beside the answers."""
    for number, message in enumerate(messages, start=1):
        content = message["content"].strip()
        if message["role"] != "assistant" and content not in text and _as_json(content) not in text:
            raise RowFault(f"the chat template leaves out or changes message {number} ({message['role']})")
        if any(call["function"]["name"] not in text for call in message.get("tool_calls", [])):
            raise RowFault(f"the chat template leaves out the tool calls of message {number}. {_ADVICE}")


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
    plain: Message = {**message, "content": content}
    plain.pop("reasoning_content", None)
    return plain


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts and numbers in a value, as they are in JSON without quotes."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield _as_json(value)


def _as_json(value: str | float) -> str:
    """Return a text or number as JSON has it, without quotes: how some templates write what a tool returned."""
    text = json.dumps(value, ensure_ascii=False)
    return text[1:-1] if isinstance(value, str) else text
