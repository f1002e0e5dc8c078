"""An inference server beside base and adapter: it answers the same rows, and is compared with both."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
from rich.progress import track

from qlora_lightning.evaluation import BASE
from qlora_lightning.evaluation.intervals import Interval, measure
from qlora_lightning.evaluation.row_results import Answer, AnswerSettings, EvaluationRow, RowResult
from qlora_lightning.support.console import terminal
from qlora_lightning.support.errors import UserError

KEY_VARIABLE = "OPENAI_API_KEY"  # in the environment; it goes into a header, and nowhere else
SERVED = "served"
NOTHING = RowResult(math.nan, 0, 0)  # the losses of a server, which it does not report
ServedAnswer = tuple[Answer, int | None]
"""An answer without scores, and the number of tokens in the prompt, if the server reports it."""


class Server:
    """An inference server that speaks OpenAI's chat completions: ``http://localhost:8000/v1``.

    ``name`` is that of the served model, ``None`` if there is only one; ``timeout`` the seconds that an answer may
    take, ``parallel`` the requests at a time.
    """

    def __init__(self, url: str, name: str | None, timeout: float, parallel: int) -> None:
        self._key = "".join(os.environ.get(KEY_VARIABLE, "").split())  # a line break is no part of a header
        self._headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self.url, self.parallel, self._timeout = url.rstrip("/"), parallel, timeout
        models = [model["id"] for model in self._send("GET", "models").get("data") or []]
        self.name = models[0] if name is None and len(models) == 1 else name
        if self.name is None or (models and self.name not in models):
            names = " or ".join(models) or "NAME (it lists none)"
            raise UserError(f"--server {url} serves no {name or 'single model'}: expected --served-name {names}.")

    def answer(self, requests: Sequence[Mapping[str, Any]]) -> Iterator[ServedAnswer]:
        """Answer chat requests greedily, several at a time, in their order, and show how many are done."""
        with ThreadPoolExecutor(self.parallel) as pool:
            answers = pool.map(self._answer, requests)
            yield from track(answers, "server", len(requests), console=terminal(stderr=True), transient=True)

    def _answer(self, request: Mapping[str, Any]) -> ServedAnswer:
        greedy = {"temperature": 0.0, "repetition_penalty": 1.0}  # vLLM takes the latter from the base's files
        response = self._send("POST", "chat/completions", {"model": self.name, **greedy, **request})
        try:
            return _read_answer(response)
        except (AttributeError, IndexError, KeyError, TypeError):
            raise UserError(f"--server {self.url} gives no answer: {self._hide_key(response)}") from None

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        url = f"{self.url}/{path}"
        try:
            response = httpx.request(method, url, json=body, headers=self._headers, timeout=self._timeout)
            response.raise_for_status()
            content = response.json()
            if isinstance(content, dict):
                return content
            fault = f"expected an object, got {content}"
        except httpx.HTTPStatusError as error:
            fault = f"{error.response.status_code}: {error.response.text}"
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            fault = f"{type(error).__name__}: {error}"
        raise UserError(
            f"--server {self.url} gives no OpenAI answer to /{path}: {self._hide_key(fault)} (a key is taken from "
            f"{KEY_VARIABLE}, --timeout gives it more seconds)"
        )

    def _hide_key(self, fault: object) -> str:
        text = str(fault).replace(self._key, "…") if self._key else str(fault)
        return " ".join(text.split())[:300]


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
    answer = Answer("\n".join(texts).strip(), usage.get("completion_tokens") or 0, stopped, {})
    return answer, usage.get("prompt_tokens")


# ---- requests --------------------------------------------------------------------------------------------------------


def make_requests(data: Any, split: str, rows: Sequence[EvaluationRow]) -> list[dict[str, Any]]:
    """Return a chat request for each row that has a prompt, with the messages in its file.

    A row that is no conversation loses its prompt: it is not answered.
    """
    chats = data.load_conversations(split, {row.number for row in rows})
    requests = []
    for row in rows:
        chat = chats.get(row.number)
        if chat is None:
            row.prompt = None
        if chat is None or row.prompt is None:
            continue
        turns = [n for n, turn in enumerate(chat.messages) if turn["role"] == "assistant" and turn.get("train", True)]
        # a template may make several samples of a row, each with the prompt of another answer
        prompts = {n: data.renderer.render_prompt(chat.messages[:n], chat.tools) for n in turns}
        matches = [n for n, prompt in prompts.items() if row.prompt[: len(prompt)] == prompt]
        request: dict[str, Any] = {"messages": list(map(_to_openai, chat.messages[: [*turns, *matches][-1]]))}
        if chat.tools:
            request["tools"] = chat.tools
        if data.template_options:
            request["chat_template_kwargs"] = data.template_options
        requests.append(request)
    return requests


def _to_openai(message: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("role", "content", "reasoning_content", "name", "tool_call_id")
    fields = {key: message[key] for key in keys if key in message}
    calls = []
    for index, call in enumerate(message.get("tool_calls") or ()):
        function = {"name": call["function"]["name"], "arguments": json.dumps(call["function"]["arguments"])}
        calls.append({"id": call.get("id", f"call_{index}"), "type": "function", "function": function})
    return {**fields, "tool_calls": calls} if calls else fields


# ---- verdict ---------------------------------------------------------------------------------------------------------


def add_served(
    answers: Sequence[ServedAnswer],
    rows: Sequence[EvaluationRow],
    settings: AnswerSettings,
    results: dict[str, list[RowResult]],
) -> dict[str, Any]:
    """Score a server's answers of the rows that have a prompt, add them to ``results``, and return the verdict."""
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
    figures = judge_answers(base, adapter, served, [rows[index].place for index in indices], settings.scores[0])
    if mismatches:
        figures["prompt_tokens"] = {**mismatches[0], "rows": len(mismatches)}
        figures["sentence"] += (
            f" Its prompts are others in {len(mismatches):,} rows ({mismatches[0]['row']}: "
            f"{mismatches[0]['server']:,} tokens, in training {mismatches[0]['ours']:,})."
        )
    return figures


def judge_answers(
    base: Sequence[Answer], adapter: Sequence[Answer], served: Sequence[Answer], places: Sequence[str], score: str
) -> dict[str, Any]:
    """Find whose answers a server gave: those of the adapter, of the base, or of neither, in figures and a sentence.

    They are a side's if they are nearer to it in most rows that base and adapter answer differently, and if no score
    differs beyond its interval. Equality would ask too much: two programs round differently, and long answers diverge.
    """
    sides = {"adapter": adapter, BASE: base}
    n_rows, n_differing = len(served), sum(a.text != b.text for a, b in zip(adapter, base, strict=True))
    n_equal = {
        side: sum(own.text == answer.text for own, answer in zip(answers, served, strict=True))
        for side, answers in sides.items()
    }
    n_nearer = {"adapter": _count_nearer(served, adapter, base), BASE: _count_nearer(served, base, adapter)}
    differences = {side: _score_differences(answers, served) for side, answers in sides.items()}
    verdict = "neither" if n_differing else "unknown"
    for side, intervals in differences.items():
        # one score may be 0 for all: an exact match of free text
        if 2 * n_nearer[side] > n_differing and all(gap.low <= 0 <= gap.high for gap in intervals.values()):
            verdict = side
    difference = differences["adapter"][score]
    figures: dict[str, Any] = {
        "verdict": verdict,
        "rows": n_rows,
        "differing_rows": n_differing,
        "equal_to_adapter": n_equal["adapter"] / n_rows,
        "equal_to_base": n_equal[BASE] / n_rows,
        "score": score,
        "difference_from_adapter": difference._asdict(),
    }
    if verdict == "unknown":
        figures["sentence"] = f"Base and adapter answer these {n_rows:,} rows alike: nothing tells them apart."
        return figures
    names = {"adapter": "as the adapter", BASE: "as the base: it has not loaded the adapter", "neither": "like neither"}
    figures["sentence"] = (
        f"The server answers {names[verdict]}. {n_equal['adapter']:,} of {n_rows:,} answers are equal to the "
        f"adapter's, {n_equal[BASE]:,} to the base's; {score} differs from the adapter's by {difference.value:+.3f} "
        f"[{difference.low:+.3f}, {difference.high:+.3f}]."
    )
    if verdict == "neither":
        n = next((n for n in range(n_rows) if served[n].text != adapter[n].text), 0)
        figures["first_difference"] = {"row": places[n], "adapter": adapter[n].text, SERVED: served[n].text}
        figures["sentence"] += (
            f" First {places[n]}: {served[n].text[:80]!r}, the adapter {adapter[n].text[:80]!r}. Look at its chat "
            "template, its stop tokens and its quantization."
        )
    return figures


def _count_nearer(served: Sequence[Answer], own: Sequence[Answer], other: Sequence[Answer]) -> int:
    """Count a server's answers that are nearest to a side's ``own``, of the rows that the ``other`` answers otherwise.

    They must be nearer to it than to the other's, and than to the side's answers to the questions before and after:
    nonsense, or answers in its style to other questions, are as near to these.
    """
    count = 0
    for n, answer in enumerate(served):
        text, next_n = own[n].text, (n + 1) % len(own)
        rivals = {other[n].text, own[n - 1].text, own[next_n].text} - {text}
        if text != other[n].text:
            count += _similarity(answer.text, text) > max(_similarity(answer.text, rival) for rival in rivals)
    return count


def _similarity(text: str, other: str) -> float:
    """Return the share of three characters in a row that two texts have in common, from 0 to 1 for equal texts."""
    counts, other_counts = (Counter(t[n : n + 3] for n in range(max(len(t) - 2, 1))) for t in (text, other))
    return 2 * (counts & other_counts).total() / (counts.total() + other_counts.total())


def _score_differences(own: Sequence[Answer], served: Sequence[Answer]) -> dict[str, Interval]:
    """Return by how much each score of the served answers differs from that of a side's own."""
    differences = {}
    for name in own[0].scores:
        values = {"own": [(answer.scores[name], 1.0) for answer in own]}
        values[SERVED] = [(answer.scores[name], 1.0) for answer in served]
        differences[name] = measure(name, values).differences[SERVED]
    return differences
