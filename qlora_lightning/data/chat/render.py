"""Render conversations as text with a chat template, and locate the answers in it."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
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
# a block without content, and the line breaks that templates write after it
_NO_REASONING = re.compile(rf"\s*(?:[<\[]{_TAG}[>\]]\s*)?[<\[]/{_TAG}[>\]]\n{{0,2}}", re.IGNORECASE)
_ADVICE = "Choose a template that knows tools: data.chat_template: chatml (if the base has ChatML's tokens)"


class AnswerSpan(NamedTuple):
    """Span of an assistant turn in a rendered text: what generation must produce."""

    message: int  # its index in the conversation
    start: int
    end: int  # of its stop token, exclusive


_Located = tuple[str, AnswerSpan] | None  # a text with an answer as generated; None if generation could not begin it so


class RenderedText(NamedTuple):
    """A text and the answers in it that are to be trained."""

    text: str
    answers: list[AnswerSpan]


class ChatText:
    r"""Renders conversations as text with the chat template of one tokenizer.

    An answer is what the template writes after the prompt that generation would see. Its reasoning is passed to the
    template under the key that it reads; if it reads none, as ``<think>…</think>`` before the content. An empty block
    that the template itself writes (Qwen3's ``<think>\n\n</think>\n\n``) belongs to the prompt.
    """

    def __init__(self, tokenizer: Any, controls: ControlTokens, reasoning: str = "template") -> None:
        self.tokenizer, self.controls, self.reasoning = tokenizer, controls, reasoning
        self._reasoning_key = find_reasoning_key(getattr(tokenizer, "chat_template", None))

    def render(self, messages: Conversation, tools: Tools, wanted: Sequence[int]) -> list[RenderedText]:
        """Render a conversation to train on.

        Usually that is one text. If the template renders an answer differently once more turns follow (some strip its
        reasoning), that answer gets its own text: the conversation up to it, as generation would see it.

        ``wanted`` are the indices of the answers that are trained; the last message is an answer.

        Raises:
            RowFault: the template rejects the conversation, changes or leaves out a message, or begins an answer
                differently than generation would.
            UserError: it writes no stop token after an answer.
        """
        messages = self.drop_earlier_reasoning(messages)
        text = self._apply(messages, tools)
        _check_messages(messages, text)
        if tools and self._apply(messages, None) == text:
            raise RowFault(f"the chat template leaves out the tools. {_ADVICE}")
        prefixes, answers = list[RenderedText](), list[AnswerSpan]()
        for index, located in self._find_spans(messages, tools, wanted, text).items():
            if located is None:
                raise RowFault(
                    f"the chat template is not prefix-preserving: it renders message {index + 1} (assistant) "
                    "otherwise than generation would see and continue it"
                )
            answer_text, span = located
            answer = self._check_answer(messages[index], answer_text, span)
            if answer_text == text:
                answers.append(answer)
            else:
                prefixes.append(RenderedText(answer_text, [answer]))
        return [*prefixes, RenderedText(text, answers)] if answers or not prefixes else prefixes

    def render_prompt(self, messages: Sequence[Message], tools: Tools) -> RenderedText:
        """Render what generation begins with; its answers are the earlier ones that training finds in the same text."""
        messages = self.drop_earlier_reasoning(messages, generation=True)
        text = self._apply(messages, tools, generation=True)
        _check_messages(messages, text)
        located = self._find_spans(messages, tools, answer_indices(messages), text).values()
        return RenderedText(text, [pair[1] for pair in located if pair and pair[0] == text])

    def drop_earlier_reasoning(self, messages: Sequence[Message], generation: bool = False) -> Conversation:
        """Return messages, without the reasoning of earlier answers if it is dropped; in generation all are earlier."""
        if self.reasoning != "drop":
            return list(messages)
        answers = answer_indices(messages)
        earlier = set(answers if generation else answers[:-1])
        return [_without_reasoning(message) if i in earlier else message for i, message in enumerate(messages)]

    def as_sent(self, prompt: Sequence[Message]) -> Sequence[dict[str, Any] | Message]:
        """Return the messages of a prompt for a server, with their reasoning as text if the template reads none."""
        messages = self.drop_earlier_reasoning(prompt, generation=True)
        return messages if self._reasoning_key else [self._as_read(message) for message in messages]

    def _apply(self, messages: Sequence[Message], tools: Tools, generation: bool = False) -> str:
        template_messages = [self._as_read(message) for message in messages]
        try:
            options = {"tools": tools, "tokenize": False, "add_generation_prompt": generation}
            return str(self.tokenizer.apply_chat_template(template_messages, **options))
        except Exception as error:  # a template is a program, and may fail in any way on what it does not expect
            advice = f". {_ADVICE}" if tools or any("tool_calls" in message for message in messages) else ""
            reason = f"{type(error).__name__}: {error}{advice}"
            raise RowFault(f"the chat template cannot render the conversation: {reason}") from error

    def _as_read(self, message: Message) -> dict[str, Any]:
        """Return a message as the template reads it: without ``train``, its reasoning under the template's key."""
        fields: dict[str, Any] = {key: value for key, value in message.items() if key not in _OURS}
        reasoning = message.get("reasoning_content")
        if reasoning and self._reasoning_key:
            fields[self._reasoning_key] = reasoning
        elif reasoning:
            fields["content"] = "<think>\n" + reasoning.strip("\n") + "\n</think>\n\n" + message["content"]
        return fields

    def _find_spans(
        self, messages: Conversation, tools: Tools, wanted: Sequence[int], text: str
    ) -> dict[int, _Located]:
        """Return where each wanted answer is.

        To render the conversation up to each would take a time quadratic in the turns. So only the first and the last
        answer of each kind are rendered: of what a template may look at to write it otherwise than at the end.
        """
        roles = [message["role"] for message in messages]
        last_question = max((index for index, role in enumerate(roles) if role == "user"), default=0)
        kinds = dict[Any, list[int]]()
        for index in wanted:
            reasoning, content = _split_reasoning(messages[index])
            shape = (reasoning is None, bool(_NO_REASONING.match(content)), not content.strip())
            spaces = (content[:1].isspace(), content[-1:].isspace())
            turns = ("tool_calls" in messages[index], index < last_question, *roles[index - 1 : index + 2])
            kinds.setdefault((*shape, *spaces, *turns), []).append(index)
        rendered = {index for members in kinds.values() for index in (members[0], members[-1])}
        found = {index: self._find_span(messages, tools, index, text) for index in rendered}
        spans = [located[1] for located in found.values() if located and located[0] == text]
        if 0 < len(spans) == len(found) < len(wanted):
            found |= self._find_alike(messages, wanted, text, spans)
        return {i: found[i] if i in found else self._find_span(messages, tools, i, text) for i in wanted}

    def _find_alike(
        self, messages: Conversation, wanted: Sequence[int], text: str, rendered: Sequence[AnswerSpan]
    ) -> dict[int, _Located]:
        """Find all wanted answers by their header; none unless those that were rendered are where it says.

        The header begins with a control token, so that no message contains it, and the text has one for each answer.
        """
        answers = answer_indices(messages)
        n_headers = len(answers) + (messages[-1]["role"] != "assistant")  # a prompt ends with that of the next answer
        controls = list(self.controls.pattern.finditer(text, 0, rendered[0].start))
        for control in controls[:-3:-1]:  # Llama 3 has two in a header, the second in those of questions too
            header = text[control.start() : rendered[0].start]
            starts = [match.end() for match in re.finditer(re.escape(header), text)]
            limits = [*(start - len(header) for start in starts[1:]), len(text)]
            if len(starts) == n_headers:
                turns = [AnswerSpan(*turn) for turn in zip(answers, starts, limits, strict=False) if turn[0] in wanted]
                with suppress(UserError):  # each is rendered by itself then
                    spans = [self._check_answer(messages[turn.message], text, turn) for turn in turns]
                    if {self._check_answer(messages[turn.message], text, turn) for turn in rendered} <= set(spans):
                        return {span.message: (text, span) for span in spans}
        return {}

    def _find_span(self, messages: Conversation, tools: Tools, index: int, text: str) -> _Located:
        """Return the whole text with an answer as generated, else the text up to the answer, and the answer's span."""
        prompt = self._apply(messages[:index], tools, generation=True)
        rendered = text if index + 1 == len(messages) else self._apply(messages[: index + 1], tools)
        turn = _find_turn(messages[index], prompt, rendered)
        if turn is None:
            return None
        generated, block_end = turn
        prefix = prompt + generated
        span = AnswerSpan(index, len(prompt) + block_end, len(prefix))
        return text if text.startswith(prefix) else prefix, span

    def _check_answer(self, message: Message, text: str, span: AnswerSpan) -> AnswerSpan:
        """Check that a turn has its answer, and return its span up to the end of the stop token."""
        index, start, limit = span
        stop = self.controls.stop_pattern.search(text, start, limit)
        if stop is None:
            raise UserError(
                "the model would never learn to stop: the chat template writes no token after an answer at which "
                "generation stops. Use the tokenizer and template that belong together. The turn as rendered: "
                f"{text[start:limit]!r}"
            )
        turn = text[start : stop.end()]
        reasoning, content = _split_reasoning(message)
        calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", [])]
        if not all(part in turn for part in ((reasoning or "").strip(), content.strip(), *_leaves(calls))):
            raise RowFault(f"the chat template changes the answer (message {index + 1}) to {turn!r}")
        return AnswerSpan(index, start, stop.end())


def answer_indices(messages: Sequence[Message]) -> list[int]:
    """Return the indices of the answers."""
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _find_turn(message: Message, prompt: str, rendered: str) -> tuple[str, int] | None:
    """Return what generation must produce after a prompt to give the rendered text; None if that is impossible.

    The second value is the length of the empty reasoning block at its start that the template itself writes.
    """
    reasoning, _ = _split_reasoning(message)
    if rendered.startswith(prompt):
        generated = rendered[len(prompt) :]
        block = _NO_REASONING.match(generated) if reasoning is None else None
        return generated, block.end() if block else 0
    opening = _OPENED.search(prompt)
    if not opening or not rendered.startswith(prompt[: opening.start()]):
        return None
    # as DeepSeek-R1: the prompt opens the reasoning, which the template never writes itself
    closing = f"\n{opening[1]}/{opening[2]}{opening[3]}\n\n"
    generated = (reasoning or "").strip("\n") + closing + rendered[opening.start() :].lstrip("\n")
    return generated, len(closing) if reasoning is None else 0


def _check_messages(messages: Sequence[Message], text: str) -> None:
    """Reject a template that leaves out or changes messages other than the answers."""
    for number, message in enumerate(messages, start=1):
        content = message["content"].strip()
        if message["role"] != "assistant" and content not in text and _as_json(content) not in text:
            raise RowFault(f"the chat template leaves out or changes message {number} ({message['role']})")
        if any(call["function"]["name"] not in text for call in message.get("tool_calls", [])):
            raise RowFault(f"the chat template leaves out the tool calls of message {number}. {_ADVICE}")


def _split_reasoning(message: Message) -> tuple[str | None, str]:
    """Return the reasoning of an answer, None if it has none, and the rest of its content."""
    reasoning, content = message.get("reasoning_content"), message["content"]
    if reasoning:
        return reasoning, content
    inline = _INLINE.match(content)
    return (inline[2], content[inline.end() :]) if inline else (None, content)


def _without_reasoning(message: Message) -> Message:
    reasoning, content = _split_reasoning(message)
    if reasoning is None:
        return message
    answer: Message = {**message, "content": content}
    answer.pop("reasoning_content", None)
    return answer


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts and numbers in a value, as they are in JSON without quotes."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield _as_json(value)


def _as_json(value: str | float) -> str:
    """Return a text or number as JSON without quotes, as some templates write what a tool returned."""
    text = json.dumps(value, ensure_ascii=False)
    return text[1:-1] if isinstance(value, str) else text
