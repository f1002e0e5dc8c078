"""An inference server beside base and adapter: it answers the same rows, and is compared with both."""

import asyncio
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import httpx

from qlora_lightning.data.rows.content import Chat, answer_indices
from qlora_lightning.evaluation import BASE, SERVED
from qlora_lightning.evaluation.intervals import Interval, measure, plain_interval
from qlora_lightning.evaluation.row_results import Answer, AnswerSettings, EvaluationRow, OnAnswers, RowResult
from qlora_lightning.support.console import count_of, progress_counter, say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import load_json

T = TypeVar("T")
KEY_VARIABLE = "OPENAI_API_KEY"  # in the environment; it goes into a header, and nowhere else
_MOST_BYTES = 16_000_000  # of an answer
NOTHING = RowResult(math.nan, 0, 0)  # the losses of a server, which it does not report
ServedAnswer = tuple[Answer, int | None]
"""An answer without scores, and the number of tokens in the prompt, if the server reports it."""


class Server:
    """An inference server that speaks OpenAI's chat completions: ``http://localhost:8000/v1``.

    ``name`` is that of the served model, ``None`` if there is only one; ``timeout`` the seconds that an answer may
    take, ``parallel`` the number of requests at a time.
    """

    def __init__(self, url: str, name: str | None, timeout: float, parallel: int) -> None:
        self._key = "".join(os.environ.get(KEY_VARIABLE, "").split())  # a line break is no part of a header
        self.url, self.parallel, self._timeout = url.rstrip("/"), parallel, timeout
        self.name = name or asyncio.run(self._find_name())

    async def _find_name(self) -> str:
        """Return the name of the only model."""
        async with self._open_client() as client:
            models = await self._send(client, "models", lambda response: [model["id"] for model in response["data"]])
        if len(models) != 1:
            names = self._hide_key(" or ".join(models)) or "NAME"
            raise UserError(f"--server {self.url} serves no single model: expected --served-name {names}.")
        return str(models[0])

    async def answer(
        self,
        requests: Mapping[int, Mapping[str, Any]],
        rows: Sequence[EvaluationRow],
        max_tokens: int,
        on_answers: OnAnswers,
    ) -> dict[int, ServedAnswer]:
        """Answer the chat requests of some rows greedily, several at a time, and show how many are done."""
        # vLLM takes the penalty from the base's files
        options = {"model": self.name, "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": max_tokens}
        answers, pending = dict[int, ServedAnswer](), iter(requests.items())
        with progress_counter("server", len(requests)) as count:
            async with self._open_client() as client:

                async def work() -> None:
                    for index, request in pending:
                        answer = await self._send(client, "chat/completions", _read_answer, {**options, **request})
                        answers[index] = answer
                        on_answers(SERVED, [rows[index]], [answer[0]])
                        count(1)

                await asyncio.gather(*(work() for _ in range(self.parallel)))  # the first fault ends all
        return {index: answers[index] for index in requests}

    def _open_client(self) -> httpx.AsyncClient:
        headers = {"Accept-Encoding": "identity"}  # a compressed answer could unpack to many GB
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return httpx.AsyncClient(headers=headers, timeout=None, limits=httpx.Limits())

    async def _send(self, client: httpx.AsyncClient, path: str, read: Callable[[Any], T], body: Any = None) -> T:
        """Return what ``read`` makes of the JSON that the server answers; a body is posted."""
        text, method = bytearray(), "GET" if body is None else "POST"
        try:
            async with (
                asyncio.timeout(self._timeout),  # of the whole answer: httpx's is of each read
                client.stream(method, f"{self.url}/{path}", json=body) as response,
            ):
                async for chunk in response.aiter_raw():
                    text += chunk
                    if len(text) > _MOST_BYTES:
                        raise ValueError(f"more than {_MOST_BYTES:,} bytes")
            if not response.is_success:
                raise ValueError(f"status {response.status_code}")
            return read(json.loads(text))
        except Exception as error:  # of whatever a server sends
            fault = self._hide_key(f"{type(error).__name__}: {error} {text.decode(errors='replace')}")
        raise UserError(
            f"--server {self.url} gives no OpenAI answer to /{path}: {fault} (a key is taken from {KEY_VARIABLE}, "
            "--timeout gives it more seconds, --served-name names a model that it does not list)"
        )

    def _hide_key(self, text: str) -> str:
        hidden = text.replace(self._key, "…") if self._key else text
        return " ".join(hidden.split())[:300]


def _read_answer(response: Mapping[str, Any]) -> ServedAnswer:
    """Return the answer in a chat completion, with reasoning and calls as templates of Qwen and Hermes write them."""
    choice, usage = response["choices"][0], response.get("usage") or {}
    message = choice["message"]
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    texts = [f"<think>\n{reasoning.strip()}\n</think>\n"] if reasoning else []
    texts.append(message.get("content") or "")
    for call in message.get("tool_calls") or []:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        with suppress(ValueError):  # servers write spaces as they like
            arguments = json.dumps(load_json(arguments), ensure_ascii=False)
        texts.append(f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>')
    stopped = choice.get("finish_reason") in ("stop", "tool_calls")
    answer = Answer("\n".join(texts).strip(), int(usage.get("completion_tokens") or 0), stopped, {})
    prompt_tokens = usage.get("prompt_tokens")
    return answer, None if prompt_tokens is None else int(prompt_tokens)


# ---- requests --------------------------------------------------------------------------------------------------------


def make_requests(data: Any, split: str, rows: Sequence[EvaluationRow]) -> dict[int, dict[str, Any]]:
    """Return a chat request for each row that has a prompt, by its index, with the messages in its file.

    A row that is no conversation, or of whose prompt ``data.max_length`` took a part, loses it: it is not answered.
    """
    chats = data.load_conversations(split, {row.number for row in rows if row.prompt is not None})
    requests, n_cut = dict[int, dict[str, Any]](), 0
    for index, row in enumerate(rows):
        chat = chats.get(row.number)
        if chat is None or row.prompt is None:
            row.prompt = None
            continue
        turn = _find_turn(data, chat, row.prompt)
        if turn is None:
            row.prompt, n_cut = None, n_cut + 1
            continue
        messages = data.renderer.template.as_sent(chat.messages[:turn])
        request: dict[str, Any] = {"messages": list(map(_to_openai, messages))}
        if chat.tools:
            request["tools"] = chat.tools
        if data.template_options:
            request["chat_template_kwargs"] = data.template_options
        requests[index] = request
    if n_cut:
        say(f"Not answered: {count_of(n_cut, 'row')}, as a server gets prompts whole, and data.max_length cut theirs.")
    return requests


def _find_turn(data: Any, chat: Chat, prompt: Sequence[int]) -> int | None:
    """Find which answer of a conversation a prompt asks for; a template may make a sample of each.

    ``None``: the prompt is no longer what the template writes. In the same turn it may go on, with an empty block of
    reasoning. Texts are compared: a sample is tokenized in other pieces than a prompt alone.
    """
    text, stops = data.tokenizer.decode(prompt), [data.tokenizer.decode([token_id]) for token_id in data.stop_ids]
    for index in reversed(answer_indices(chat.messages)):
        rendered = data.tokenizer.decode(data.renderer.render_prompt(chat.messages[:index], chat.tools))
        if text.startswith(rendered) and not any(stop in text[len(rendered) :] for stop in stops):
            return index
    return None


def _to_openai(message: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("role", "content", "reasoning_content", "name", "tool_call_id")
    fields = {key: message[key] for key in keys if key in message}
    calls = []
    for index, call in enumerate(message.get("tool_calls") or ()):
        function = {"name": call["function"]["name"], "arguments": json.dumps(call["function"]["arguments"])}
        calls.append({"id": call.get("id", f"call_{index}"), "type": "function", "function": function})
    return {**fields, "tool_calls": calls} if calls else fields


# ---- match -----------------------------------------------------------------------------------------------------------


def score_served(
    answers: Mapping[int, ServedAnswer],
    rows: Sequence[EvaluationRow],
    settings: AnswerSettings,
    results: dict[str, list[RowResult]],
) -> dict[str, Any]:
    """Score a server's answers, by the indices of their rows, and add them to ``results``; return whose they are."""
    # a server may answer more than it was asked for, and scores of a long text take minutes
    longest = settings.max_new_tokens * max(map(len, settings.tokenizer.get_vocab()))
    results[SERVED] = [NOTHING] * len(rows)
    mismatches = []  # prompts of another length on the server
    for index, (unscored, prompt_tokens) in answers.items():
        row, n_tokens, text = rows[index], len(rows[index].prompt or ()), unscored.text[:longest]
        scored = unscored._replace(text=text, scores=settings.score(text, row))
        results[SERVED][index] = NOTHING._replace(answer=scored)
        if prompt_tokens not in (None, n_tokens):
            mismatches.append({"row": row.place, "ours": n_tokens, "server": prompt_tokens})
    indices = list(answers)
    base, adapter, served = ([answer for n in indices if (answer := side[n].answer)] for side in results.values())
    figures = decide(base, adapter, served, next(iter(settings.scores)))
    if figures["match"] == "neither":
        n = next(n for n, answer in enumerate(served) if answer.text != adapter[n].text)
        texts = {"adapter": adapter[n].text, SERVED: served[n].text}
        figures["first_difference"] = {"row": rows[indices[n]].place, **texts}
    if mismatches:
        figures["prompt_tokens"] = {**mismatches[0], "rows": len(mismatches)}
    return {**figures, "sentence": describe(figures)}


def decide(base: Sequence[Answer], adapter: Sequence[Answer], served: Sequence[Answer], score: str) -> dict[str, Any]:
    """Decide whose answers a server gave: those of the adapter, of the base, or of neither; return the figures.

    They can be a side's if no score differs from its own beyond the interval; if they can be of both, more equal
    answers decide. Equality alone would ask too much: two programs round differently, and long answers diverge.
    """
    equal, gaps, differing = dict[str, int](), dict[str, dict[str, Interval]](), dict[str, list[str]]()
    for side, own in (("adapter", adapter), (BASE, base)):
        equal[side] = sum(ours.text == theirs.text for ours, theirs in zip(own, served, strict=True))
        gaps[side] = {name: _measure_gap(name, own, served) for name in own[0].scores}
        differing[side] = [name for name, gap in gaps[side].items() if gap.value and not gap.low <= 0 <= gap.high]
    possible = [side for side in equal if not differing[side]]
    match = "neither"
    if all(ours.text == theirs.text for ours, theirs in zip(adapter, base, strict=True)):
        match = "unknown"
    elif len(possible) == 1:
        match = possible[0]
    elif possible and equal["adapter"] != equal[BASE]:
        match = "adapter" if equal["adapter"] > equal[BASE] else BASE
    if match == "neither" and differing["adapter"]:
        score = differing["adapter"][0]  # the one that tells it from the adapter
    return {
        "match": match,
        "rows": len(served),
        "equal_to_adapter": equal["adapter"] / len(served),
        "equal_to_base": equal[BASE] / len(served),
        "score": score,
        "difference_from_adapter": plain_interval(gaps["adapter"][score]),
    }


def _measure_gap(score: str, own: Sequence[Answer], served: Sequence[Answer]) -> Interval:
    """Return by how much a score of the served answers differs from that of a side's own."""
    sides = {"own": own, SERVED: served}
    values = {side: [(answer.scores[score], 1.0) for answer in answers] for side, answers in sides.items()}
    return measure(score, values).differences[SERVED]


def describe(figures: Mapping[str, Any]) -> str:
    """Describe in sentences whose answers a server gave, and what differs."""
    n_rows, gap, match = figures["rows"], figures["difference_from_adapter"], figures["match"]
    if match == "unknown":
        text = f"Base and adapter answer {count_of(n_rows, 'row')} alike: nothing tells them apart."
    else:
        names = {"adapter": "as the adapter", BASE: "as the base: it has not loaded the adapter"}
        n_equal = {side: round(figures[f"equal_to_{side}"] * n_rows) for side in ("adapter", BASE)}
        bounds = "" if gap["low"] is None else f" [{gap['low']:+.3f}, {gap['high']:+.3f}]"
        text = (
            f"The server answers {names.get(match, 'like neither')}. {n_equal['adapter']:,} of {n_rows:,} answers are "
            f"equal to the adapter's, {n_equal[BASE]:,} to the base's; {figures['score']} differs from the adapter's "
            f"by {gap['value']:+.3f}{bounds}."
        )
    if first := figures.get("first_difference"):
        text += (
            f" First {first['row']}: {first[SERVED][:80]!r}, the adapter {first['adapter'][:80]!r}. Look at its chat "
            "template, its stop tokens and its quantization."
        )
    if other := figures.get("prompt_tokens"):
        text += (
            f" Its prompts are others in {count_of(other['rows'], 'row')} ({other['row']}: "
            f"{count_of(other['server'], 'token')}, in training {other['ours']:,})."
        )
    return text
