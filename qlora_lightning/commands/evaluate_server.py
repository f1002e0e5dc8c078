"""An inference server beside base and adapter: it answers the same rows, and is compared with both."""

import asyncio
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import httpx

from qlora_lightning.data.rows.content import Chat, answer_indices
from qlora_lightning.evaluation import BASE, SERVED
from qlora_lightning.evaluation.intervals import Interval, measure, plain_interval
from qlora_lightning.evaluation.row_results import Answer, AnswerSettings, EvaluationRow, OnAnswers, RowResult
from qlora_lightning.support.console import progress_counter, say
from qlora_lightning.support.errors import UserError

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
        self._headers = {"Accept-Encoding": "identity"}  # a compressed answer could unpack to many GB
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"
        self.url, self.parallel, self._timeout = url.rstrip("/"), parallel, timeout
        models = asyncio.run(self._list_models())
        self.name = models[0] if name is None and len(models) == 1 else name
        if self.name is None or (models and self.name not in models):
            names = self._hide_key(" or ".join(models)) or "NAME (it lists none)"
            raise UserError(f"--server {url} serves no {name or 'single model'}: expected --served-name {names}.")

    async def _list_models(self) -> list[str]:
        """Return the names of the models; none if the server has no such list."""
        async with _open_client() as client:
            response = await self._send(client, "GET", "models")
        try:
            return [str(model["id"]) for model in response.get("data") or []]
        except (AttributeError, KeyError, TypeError):
            return []

    async def answer(
        self, requests: Sequence[Mapping[str, Any]], on_answer: Callable[[int, ServedAnswer], None]
    ) -> list[ServedAnswer]:
        """Answer chat requests greedily, several at a time, and show how many are done.

        ``on_answer`` is called with the number of a request and its answer, as it comes.
        """
        # vLLM takes the penalty from the base's files
        greedy = {"model": self.name, "temperature": 0.0, "repetition_penalty": 1.0}
        answers, pending = dict[int, ServedAnswer](), enumerate(requests)
        with progress_counter("server", len(requests)) as count:
            async with _open_client() as client:

                async def work() -> None:
                    for number, request in pending:
                        response = await self._send(client, "POST", "chat/completions", {**greedy, **request})
                        try:
                            answers[number] = _read_answer(response)
                        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError):
                            fault = self._hide_key(response)
                            raise UserError(f"--server {self.url} gives no answer: {fault}") from None
                        on_answer(number, answers[number])
                        count(1)

                await asyncio.gather(*(work() for _ in range(self.parallel)))  # the first fault ends all
        return [answers[number] for number in range(len(requests))]

    async def _send(self, client: httpx.AsyncClient, method: str, path: str, body: Any = None) -> dict[str, Any]:
        try:
            text = bytearray()
            async with (
                asyncio.timeout(self._timeout),  # of the whole answer: httpx's is of each read
                client.stream(method, f"{self.url}/{path}", json=body, headers=self._headers) as response,
            ):
                async for chunk in response.aiter_raw():
                    text += chunk
                    if len(text) > _MOST_BYTES:
                        raise ValueError(f"more than {_MOST_BYTES:,} bytes")
            if path == "models" and response.status_code in (404, 405):
                return {}  # not every server has such a list
            if response.is_success:
                content = json.loads(text)
                if isinstance(content, dict):
                    return content
                fault = f"expected an object, got {content}"
            else:
                fault = f"{response.status_code}: {text.decode(errors='replace')}"
        except TimeoutError:
            fault = f"none within {self._timeout:g} seconds"
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError) as error:
            fault = f"{type(error).__name__}: {error}"
        raise UserError(
            f"--server {self.url} gives no OpenAI answer to /{path}: {self._hide_key(fault)} (a key is taken from "
            f"{KEY_VARIABLE}, --timeout gives it more seconds)"
        )

    def _hide_key(self, fault: object) -> str:
        text = str(fault).replace(self._key, "…") if self._key else str(fault)
        return " ".join(text.split())[:300]


def _open_client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=None, limits=httpx.Limits())  # by default 100 connections, and 5 seconds


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
            arguments = json.dumps(json.loads(arguments), ensure_ascii=False)
        texts.append(f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>')
    stopped = choice.get("finish_reason") in ("stop", "tool_calls")
    n_answer, n_prompt = (usage.get(f"{part}_tokens") for part in ("completion", "prompt"))
    if not all(0 <= int(number or 0) < 1 << 31 for number in (n_answer, n_prompt)):
        raise ValueError("no number of tokens")
    answer = Answer("\n".join(texts).strip(), int(n_answer or 0), stopped, {})
    return answer, None if n_prompt is None else int(n_prompt)


# ---- requests --------------------------------------------------------------------------------------------------------


def make_requests(data: Any, split: str, rows: Sequence[EvaluationRow]) -> list[dict[str, Any]]:
    """Return a chat request for each row that has a prompt, with the messages in its file.

    A row that is no conversation, or of whose prompt ``data.max_length`` took a part, loses it: it is not answered.
    """
    chats = data.load_conversations(split, {row.number for row in rows if row.prompt is not None})
    requests, n_cut = [], 0
    for row in rows:
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
        requests.append(request)
    if n_cut:
        say(f"{n_cut:,} rows are not answered: a server gets prompts whole, and data.max_length cut theirs.")
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


def ask_server(
    server: Server,
    requests: Sequence[Mapping[str, Any]],
    rows: Sequence[EvaluationRow],
    settings: AnswerSettings | None,
    on_answers: OnAnswers,
) -> list[ServedAnswer]:
    """Return the server's answers to the rows that have a prompt, in their order."""
    if settings is None:
        raise UserError("--server: no row has a prompt that it could answer.", "server")
    requests = [{**request, "max_tokens": settings.max_new_tokens} for request in requests]
    prompted_rows = [row for row in rows if row.prompt is not None]

    def on_answer(number: int, answer: ServedAnswer) -> None:
        on_answers(SERVED, [prompted_rows[number]], [answer[0]])

    answers = asyncio.run(server.answer(requests, on_answer))
    # a server may answer more than it was asked for, and scores of a long text take minutes
    longest = settings.max_new_tokens * max(map(len, settings.tokenizer.get_vocab()))
    return [(answer._replace(text=answer.text[:longest]), prompt_tokens) for answer, prompt_tokens in answers]


# ---- match -----------------------------------------------------------------------------------------------------------


def score_served(
    answers: Sequence[ServedAnswer],
    rows: Sequence[EvaluationRow],
    settings: AnswerSettings,
    results: dict[str, list[RowResult]],
) -> dict[str, Any]:
    """Score a server's answers of the rows that have a prompt, and add them to ``results``; return whose they are."""
    indices = [index for index, row in enumerate(rows) if row.prompt is not None]
    results[SERVED] = [NOTHING] * len(results[BASE])
    mismatches = []  # prompts of another length on the server
    for index, (served_answer, prompt_tokens) in zip(indices, answers, strict=True):
        row, n_tokens = rows[index], len(rows[index].prompt or ())
        scored = served_answer._replace(scores=settings.score(served_answer.text, row))
        results[SERVED][index] = NOTHING._replace(answer=scored)
        if prompt_tokens not in (None, n_tokens):
            mismatches.append({"row": row.place, "ours": n_tokens, "server": prompt_tokens})
    base, adapter, served = ([answer for n in indices if (answer := side[n].answer)] for side in results.values())
    figures = decide(base, adapter, served, settings.scores[0])
    if figures["match"] == "neither":
        n = next((n for n, answer in enumerate(served) if answer.text != adapter[n].text), 0)
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
        text = f"Base and adapter answer these {n_rows:,} rows alike: nothing tells them apart."
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
            f" Its prompts are others in {other['rows']:,} rows ({other['row']}: {other['server']:,} tokens, in "
            f"training {other['ours']:,})."
        )
    return text
