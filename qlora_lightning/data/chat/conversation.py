"""A conversation as text by the chat template, and where its answers are: what generation must produce."""

import json
import os
import re
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from qlora_lightning.data.chat import templates
from qlora_lightning.data.rows.content import Conversation, Message, RowFault, Tools
from qlora_lightning.support.errors import UserError

_OURS = ("train", "reasoning_content")
_TAG = r"\w*(?:think|reason)\w*"  # <think>, [THINK], <seed:think>, …
_INLINE = re.compile(rf"\s*<({_TAG})>(.*?)</\1>\s*", re.DOTALL)  # reasoning within the content
# at the end of a generation prompt: a block of reasoning that it opens, or that it writes empty; Gemma 4 has channels
_PROMPT_BLOCK = re.compile(
    rf"(?P<opening>[<\[]{_TAG}[>\]]|<\|channel>thought)\s*(?P<closing>[<\[]/{_TAG}[>\]]|<channel\|>)?\s*$",
    re.IGNORECASE,
)
# at the start of an answer: a block without content, and the line breaks that templates write after it
_NO_REASONING = re.compile(rf"\A\s*(?:[<\[]{_TAG}[>\]]\s*)?[<\[]/{_TAG}[>\]]\n{{0,2}}", re.IGNORECASE)
_JSON_LEAF = re.compile(r'"((?:[^"\\]|\\.)*)"|(-?\d[\d.eE+-]*)')  # a text without its quotes, or a number
_ADVICE = "Choose a template that knows tools: data.chat_template: chatml (if the base has ChatML's tokens)"


class AnswerSpan(NamedTuple):
    """Span of an assistant turn in a rendered text: what generation must produce."""

    message: int  # its index in the conversation
    start: int
    end: int  # of its stop token, exclusive


@dataclass
class RenderedText:
    """A text and the answers in it that are to be trained; once it is encoded, its tokens."""

    text: str
    answers: list[AnswerSpan]
    ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # characters of each token: start, and end exclusive

    def find_token(self, character: int) -> int:
        """Return the index of the first token that begins at a character or after it."""
        return bisect_left(self.spans, character, key=lambda span: span[0])


class TemplateRenderer:
    r"""Renders conversations as text with the chat template of one tokenizer.

    An answer is what the template writes after the prompt that generation would see. Its reasoning is passed to the
    template under the key that it reads; if it reads none, as ``<think>…</think>`` before the content. An empty block
    that the template itself writes (Qwen3's ``<think>\n\n</think>\n\n``) belongs to the prompt.
    """

    def __init__(self, tokenizer: Any, controls: templates.ControlTokens) -> None:
        self.tokenizer, self.controls = tokenizer, controls
        self._reasoning_key = templates.find_reasoning_key(getattr(tokenizer, "chat_template", None))
        self._reads_parts = templates.reads_parts(tokenizer)
        self._ending, self._call_ending = (
            templates.find_ending(tokenizer, controls.stop_pattern, is_call) for is_call in (False, True)
        )

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
        messages = self.arrange_reasoning(messages)
        text = self._apply_ended(messages, tools)
        _check_messages(messages, text)
        if tools and self._apply_ended(messages, None) == text:
            raise RowFault(f"the chat template leaves out the tools. {_ADVICE}")
        own_texts, answers = list[RenderedText](), list[AnswerSpan]()
        for index in wanted:
            written = text if index + 1 == len(messages) else self._apply_ended(messages[: index + 1], tools)
            generated, answer = self._render_answer(messages[: index + 1], tools, written)
            # text after the last stop token, which Phi-3 writes, does not change the answer
            if text.startswith(generated[: answer.end]):
                answers.append(answer)
            else:
                own_texts.append(RenderedText(generated, [answer]))
        return [*own_texts, RenderedText(text, answers)] if answers or not own_texts else own_texts

    def render_prompt(self, messages: Sequence[Message], tools: Tools, wanted: Sequence[int]) -> RenderedText:
        """Render what generation begins with; its answers are the wanted ones that training finds in the same text."""
        messages = self.arrange_reasoning(messages)
        text = self._apply(messages, tools, generation=True)
        _check_messages(messages, text)
        answers = list[AnswerSpan]()
        for index in wanted:
            with suppress(UserError):  # which training rejects
                written = self._apply_ended(messages[: index + 1], tools)
                generated, answer = self._render_answer(messages[: index + 1], tools, written)
                answers += [answer] if text.startswith(generated[: answer.end]) else []
        return RenderedText(text, answers)

    def arrange_reasoning(self, messages: Sequence[Message]) -> Conversation:
        """Move a ``<think>`` block at the start of an answer to the key of the template, if it has one.

        Otherwise some templates would write it next to a block of their own, or where the user sees it.
        """
        return [_read_block(message) for message in messages] if self._reasoning_key else list(messages)

    @cached_property
    def opens_reasoning(self) -> bool:
        """Whether generation begins within a block of reasoning, as with DeepSeek-R1."""
        with suppress(RowFault):
            block = _PROMPT_BLOCK.search(self._apply([{"role": "user", "content": "?"}], None, generation=True))
            return block is not None and not block["closing"]
        return False

    def as_sent(self, prompt: Sequence[Message]) -> Sequence[dict[str, Any] | Message]:
        """Return the messages of a prompt for a server, with their reasoning as text if the template reads none."""
        messages = self.arrange_reasoning(prompt)
        return messages if self._reasoning_key else [self._as_read(message) for message in messages]

    def _apply(self, messages: Sequence[Message], tools: Tools, generation: bool = False) -> str:
        template_messages = [self._as_read(message) for message in messages]
        options = {"tools": tools, "tokenize": False, "add_generation_prompt": generation}
        try:
            return str(self.tokenizer.apply_chat_template(template_messages, **options))
        except MemoryError:
            raise
        except Exception as error:  # a template is a program, and may fail in any way on what it does not expect
            advice = f". {_ADVICE}" if tools or any("tool_calls" in message for message in messages) else ""
            reason = f"{type(error).__name__}: {error}{advice}"
            raise RowFault(f"the chat template cannot render the conversation: {reason}") from error

    def _apply_ended(self, messages: Sequence[Message], tools: Tools) -> str:
        """Render a conversation up to an answer, with its end even if only the header of the next turn writes it."""
        return self._apply(messages, tools) + (self._call_ending if "tool_calls" in messages[-1] else self._ending)

    def _as_read(self, message: Message) -> dict[str, Any]:
        """Return a message as the template reads it: without ``train``, its reasoning under the template's key."""
        fields: dict[str, Any] = {key: value for key, value in message.items() if key not in _OURS}
        reasoning = message.get("reasoning_content")
        if reasoning and self._reasoning_key:
            fields[self._reasoning_key] = reasoning
        elif reasoning:
            fields["content"] = "<think>\n" + reasoning.strip("\n") + "\n</think>\n\n" + message["content"]
        if self._reads_parts:
            fields["content"] = [{"type": "text", "text": fields["content"]}]
        return fields

    def _render_answer(self, messages: Conversation, tools: Tools, written: str) -> tuple[str, AnswerSpan]:
        """Return the text up to an answer, the last message, as generation sees and continues it, and the answer there.

        ``written`` is the text up to the answer as the template writes it by itself.
        """
        index, message = len(messages) - 1, messages[-1]
        reasoning, content = split_reasoning(message)
        prompt = self._apply(messages[:-1], tools, generation=True)
        generated = self._find_generated(messages, tools, prompt, written)
        if generated is None:
            advice = ". Its reasoning may need data.template_options, such as enable_thinking: true"
            raise RowFault(
                f"the chat template is not prefix-preserving: it renders message {index + 1} (assistant) otherwise "
                f"than generation would see and continue it{'' if reasoning is None else advice}"
            )
        n_empty = len(generated) - len(_NO_REASONING.sub("", generated)) if reasoning is None else 0
        stop = self.controls.stop_pattern.search(generated, n_empty)
        if stop is None:
            raise UserError(
                "the model would never learn to stop: the chat template writes no token after an answer at which "
                f"generation stops, such as the tokenizer's eos_token. The turn as rendered: {generated!r}",
                "chat_template.stop_token",
            )
        turn = generated[n_empty : stop.end()]
        thoughts = (reasoning or "").strip()
        rest = turn[turn.find(thoughts) + len(thoughts) :]  # the content and the calls follow the reasoning
        if thoughts not in turn or not all(part in rest for part in (content.strip(), *_call_texts(message))):
            raise RowFault(f"the chat template changes the answer (message {index + 1}) to {turn!r}")
        return prompt + generated, AnswerSpan(index, len(prompt) + n_empty, len(prompt) + stop.end())

    def _find_generated(self, messages: Conversation, tools: Tools, prompt: str, written: str) -> str | None:
        """Return what generation must produce after its prompt; None if it could not begin the answer so."""
        if written.startswith(prompt):  # as most templates
            return written[len(prompt) :]
        block = _PROMPT_BLOCK.search(prompt)
        head = prompt[: block.start()] if block else prompt
        turn = self._turn_after_head(head, written)
        if turn is None:
            turn = self._turn_after_header(messages, tools, head, written)
        if turn is None or block is None:
            return turn
        reasoning, _ = split_reasoning(messages[-1])
        return next((found for case in _BLOCK_CASES if (found := case(block, turn, reasoning)) is not None), None)

    def _turn_after_head(self, head: str, written: str) -> str | None:
        """Find the last message after ``head``, the generation prompt up to the end of the header, as DeepSeek-R1."""
        return written[len(head) :] if written.startswith(head) else None

    def _turn_after_header(self, messages: Conversation, tools: Tools, head: str, written: str) -> str | None:
        """Find it after the last header before the first difference from another answer, as gpt-oss.

        Its template writes earlier turns otherwise once an answer follows: it leaves out the reasoning of calls, which
        generation sees.
        """
        header = head.removeprefix(self._apply(messages[:-1], tools))
        other: Message = {**messages[-1], "content": "\uffff"}
        if "reasoning_content" in other:
            other["reasoning_content"] = "\uffff"
        texts = [written, self._apply([*messages[:-1], other], tools)]
        shared = os.path.commonprefix(texts)  # noqa: RUF071 texts, not paths
        before, found, _ = shared.rpartition(header) if header else ("", "", "")
        # an earlier header has what a tool returned after it, if the template writes none before the answer
        return written[len(before + header) :] if found and _has_content(before, messages[-2]) else None


# ---- a block of reasoning at the end of the prompt, which is not what the template writes there ----------------------


def _empty_block(block: re.Match[str], turn: str, reasoning: str | None) -> str | None:
    """The block is empty, and in the prompt alone, as with Gemma 4 31B."""
    return _NO_REASONING.sub("", turn) if block["closing"] and reasoning is None else None


def _written_block(block: re.Match[str], turn: str, _: str | None) -> str | None:
    """The template writes the block too, not with the line breaks of the prompt, as Nemotron 3 and GLM 4.7."""
    opening = block["opening"]
    is_written = not block["closing"] and turn.startswith((opening, _closing_of(opening)))
    return turn.removeprefix(opening).lstrip("\n") if is_written else None


def _opened_block(block: re.Match[str], turn: str, reasoning: str | None) -> str | None:
    """The prompt opens the reasoning, which the template never writes itself, as with DeepSeek-R1."""
    if block["closing"]:
        return None
    return (reasoning or "").strip("\n") + f"\n{_closing_of(block['opening'])}\n\n" + turn.lstrip("\n")


def _closing_of(opening: str) -> str:
    return f"{opening[0]}/{opening[1:]}"


_BLOCK_CASES = (_empty_block, _written_block, _opened_block)  # tried in this order


def _check_messages(messages: Sequence[Message], text: str) -> None:
    """Reject a template that leaves out or changes messages other than the answers."""
    for number, message in enumerate(messages, start=1):
        if message["role"] != "assistant" and not _has_content(text, message):
            raise RowFault(f"the chat template leaves out or changes message {number} ({message['role']})")
        if not all(part in text for part in _call_texts(message)):
            raise RowFault(f"the chat template leaves out or changes the tool calls of message {number}. {_ADVICE}")


def _has_content(text: str, message: Message) -> bool:
    """Whether a text has the content of a message; some templates write what a tool returned as JSON."""
    content = message["content"].strip()
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text


def _call_texts(message: Message) -> list[str]:
    """Return the names of a message's calls, and the texts and numbers in their arguments, as JSON without quotes."""
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", [])]
    return [text or number for text, number in _JSON_LEAF.findall(json.dumps(calls, ensure_ascii=False))]


def split_reasoning(message: Message) -> tuple[str | None, str]:
    """Return the reasoning of an answer, None if it has none, and the rest of its content."""
    reasoning, content = message.get("reasoning_content"), message["content"]
    if reasoning:
        return reasoning, content
    inline = _INLINE.match(content)
    return (inline[2], content[inline.end() :]) if inline else (None, content)


def _read_block(message: Message) -> Message:
    """Return an answer that begins with a ``<think>`` block with its reasoning under the key; others as they are."""
    opened, _, rest = message["content"].partition("<think>")
    reasoning, closing, content = rest.partition("</think>")
    if opened.strip() or not closing or not reasoning.strip() or message["role"] != "assistant":
        return message
    return {**message, "reasoning_content": reasoning.strip("\n"), "content": content.lstrip("\n")}
