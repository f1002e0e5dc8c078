"""An inference server beside base and adapter: it answers the same rows, and is compared with both."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from rich.progress import track

from qlora_lightning.evaluation import BASE
from qlora_lightning.evaluation.intervals import Interval, measure
from qlora_lightning.evaluation.row_results import Answer, AnswerSettings, EvaluationRow, RowResult
from qlora_lightning.evaluation.scores import chrf
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
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
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
        if not response.get("choices") or "message" not in response["choices"][0]:
            raise UserError(f"--server {self.url} gives no answer: {self._hide_key(response)}")
        choice, usage = response["choices"][0], response.get("usage") or {}
        message = choice["message"]
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        texts = [f"<think>\n{reasoning.strip()}\n</think>\n"] if reasoning else []
        texts.append(message.get("content") or "")
        for call in message.get("tool_calls") or []:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            texts.append(f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>')
        stopped = choice.get("finish_reason") in ("stop", "tool_calls")
        answer = Answer("\n".join(texts).strip(), usage.get("completion_tokens", 0), stopped, {})
        return answer, usage.get("prompt_tokens")

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
        text = " ".join(str(fault).split())[:300]
        return text.replace(self._key, "…") if self._key else text


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

    They are a side's if, by chrF, in most rows that base and adapter answer differently the server's answer is nearer
    to that side's than to the other's, and nearer than these two are to each other, and if no score differs beyond its
    interval. Equality would ask too much: two programs round differently, and long answers diverge.
    """
    texts = [tuple(answer.text for answer in row) for row in zip(adapter, base, served, strict=True)]
    # nonsense is less similar to both than these are to each other
    similarities = [
        (_similarity(served_text, adapter_text), _similarity(served_text, base_text), chrf(base_text, adapter_text))
        for adapter_text, base_text, served_text in texts
        if adapter_text != base_text
    ]
    n_nearer = {"adapter": sum(to_adapter > max(to_base, between) for to_adapter, to_base, between in similarities)}
    n_nearer[BASE] = sum(to_base > max(to_adapter, between) for to_adapter, to_base, between in similarities)
    differences = {
        side: {name: _score_difference(name, answers, served) for name in answers[0].scores}
        for side, answers in (("adapter", adapter), (BASE, base))
    }
    matches = [
        side
        for side, intervals in differences.items()  # one score may be 0 for all: an exact match of free text
        if 2 * n_nearer[side] > len(similarities) and all(gap.low <= 0 <= gap.high for gap in intervals.values())
    ]
    verdict, difference = (matches or ["neither"])[0], differences["adapter"][score]
    n_rows, n_equal = len(texts), [sum(row[2] == row[side] for row in texts) for side in (0, 1)]
    figures: dict[str, Any] = {
        "verdict": verdict,
        "rows": n_rows,
        "differing_rows": len(similarities),
        "equal_to_adapter": n_equal[0] / n_rows,
        "equal_to_base": n_equal[1] / n_rows,
        "score": score,
        "difference_from_adapter": difference._asdict(),
    }
    if not similarities:
        sentence = f"Base and adapter answer these {n_rows:,} rows alike: nothing tells them apart."
        return {**figures, "verdict": "unknown", "sentence": sentence}
    names = {"adapter": "as the adapter", BASE: "as the base: it has not loaded the adapter", "neither": "like neither"}
    figures["sentence"] = (
        f"The server answers {names[verdict]}. {n_equal[0]:,} of {n_rows:,} answers are equal to the adapter's, "
        f"{n_equal[1]:,} to the base's; {score} differs from the adapter's by {difference.value:+.3f} "
        f"[{difference.low:+.3f}, {difference.high:+.3f}]."
    )
    if verdict == "neither":
        index = next((n for n, (adapter_text, _, served_text) in enumerate(texts) if served_text != adapter_text), 0)
        adapter_text, _, served_text = texts[index]
        figures["first_difference"] = {"row": places[index], "adapter": adapter_text, SERVED: served_text}
        figures["sentence"] += (
            f" First {places[index]}: {served_text[:80]!r}, the adapter {adapter_text[:80]!r}. Look at its chat "
            "template, its stop tokens and its quantization."
        )
    return figures


def _similarity(text: str, expected: str) -> float:
    return 1.0 if text == expected else chrf(text, expected)  # chrF of two empty texts is 0


def _score_difference(score: str, answers: Sequence[Answer], served: Sequence[Answer]) -> Interval:
    """Return by how much the served answers' score differs from that of a side's answers."""
    values = {"own": [(answer.figures[score], 1.0) for answer in answers]}
    values[SERVED] = [(answer.figures[score], 1.0) for answer in served]
    return measure(score, values).differences[SERVED]
