"""A server beside base and adapter: it answers the same rows, and its answers are found to be those of one of them."""

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
NOTHING = RowResult(math.nan, 0, 0)  # of a server's losses
ServedAnswer = tuple[Answer, int | None]
"""An answer without scores, and how many tokens the server counts in the prompt, if it says so."""


class Server:
    """An inference server that speaks OpenAI's chat completions: ``http://localhost:8000/v1``.

    ``name`` is that of the served model, ``None`` if there is only one; ``timeout`` the seconds that an answer may
    take, ``parallel`` the requests at a time.
    """

    def __init__(self, url: str, name: str | None, timeout: float, parallel: int) -> None:
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        self._headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self.url, self.parallel, self._timeout = url.rstrip("/"), parallel, timeout
        served = [model["id"] for model in self._send("GET", "models").get("data") or []]
        self.name = served[0] if name is None and len(served) == 1 else name
        if self.name is None or (served and self.name not in served):
            names = " or ".join(served) or "NAME (it lists none)"
            raise UserError(f"--server {url} serves no {name or 'single model'}: expected --served-name {names}.")

    def answer(self, requests: Sequence[Mapping[str, Any]]) -> Iterator[ServedAnswer]:
        """Answer chat requests greedily, several at a time, in their order, and show how many are done."""
        with ThreadPoolExecutor(self.parallel) as pool:
            answers = pool.map(self._answer, requests)
            yield from track(answers, "server", len(requests), console=terminal(stderr=True), transient=True)

    def _answer(self, request: Mapping[str, Any]) -> ServedAnswer:
        greedy = {"temperature": 0.0, "repetition_penalty": 1.0}  # vLLM takes the latter from the base's files
        found = self._send("POST", "chat/completions", {"model": self.name, **greedy, **request})
        if not found.get("choices") or "message" not in found["choices"][0]:
            raise UserError(f"--server {self.url} gives no answer: {self._hide_key(found)}")
        choice, usage = found["choices"][0], found.get("usage") or {}
        message = choice["message"]
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        texts = [f"<think>\n{thoughts.strip()}\n</think>\n"] if thoughts else []
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
            answer = response.json()
            if isinstance(answer, dict):
                return answer
            fault = f"expected an object, got {answer}"
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
    """Return a chat request for each row that has a prompt, of the messages that its file has.

    A row that is no conversation gets no prompt any more: it is not answered.
    """
    chats = data.load_conversations(split, {row.number for row in rows})
    requests = []
    for row in rows:
        chat = chats.get(row.number)
        if chat is None:
            row.prompt = None
        if chat is None or row.prompt is None:
            continue
        answers = [
            at for at, each in enumerate(chat.messages) if each["role"] == "assistant" and each.get("train", True)
        ]
        # a template may make several samples of a row, each with the prompt of another answer
        prompts = {at: data.renderer.render_prompt(chat.messages[:at], chat.tools) for at in answers}
        own = [at for at, prompt in prompts.items() if row.prompt[: len(prompt)] == prompt]
        request: dict[str, Any] = {"messages": list(map(_to_openai, chat.messages[: [*answers, *own][-1]]))}
        if chat.tools:
            request["tools"] = chat.tools
        if data.template_options:
            request["chat_template_kwargs"] = data.template_options
        requests.append(request)
    return requests


def _to_openai(message: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("role", "content", "reasoning_content", "name", "tool_call_id")
    found = {key: message[key] for key in keys if key in message}
    calls = []
    for at, call in enumerate(message.get("tool_calls") or ()):
        function = {"name": call["function"]["name"], "arguments": json.dumps(call["function"]["arguments"])}
        calls.append({"id": call.get("id", f"call_{at}"), "type": "function", "function": function})
    return {**found, "tool_calls": calls} if calls else found


# ---- verdict ---------------------------------------------------------------------------------------------------------


def add_served(
    answers: Sequence[ServedAnswer],
    rows: Sequence[EvaluationRow],
    settings: AnswerSettings,
    results: dict[str, list[RowResult]],
) -> dict[str, Any]:
    """Score a server's answers of the rows that have a prompt, add them to ``results``, and return the verdict."""
    asked = [index for index, row in enumerate(rows) if row.prompt is not None]
    results[SERVED] = [NOTHING] * len(results[BASE])
    others = []  # prompts that have another length there
    for index, (answer, prompt_tokens) in zip(asked, answers, strict=True):
        row, length = rows[index], len(rows[index].prompt or ())
        scored = answer._replace(scores=settings.score(answer.text, row))
        results[SERVED][index] = NOTHING._replace(answer=scored)
        if prompt_tokens not in (None, length):
            others.append({"row": row.place, "ours": length, "server": prompt_tokens})
    base, adapter, served = ([found for index in asked if (found := each[index].answer)] for each in results.values())
    figures = judge_answers(base, adapter, served, [rows[index].place for index in asked], settings.scores[0])
    if others:
        figures["prompt_tokens"] = {**others[0], "rows": len(others)}
        figures["sentence"] += (
            f" Its prompts are others in {len(others):,} rows ({others[0]['row']}: {others[0]['server']:,} tokens, in "
            f"training {others[0]['ours']:,})."
        )
    return figures


def judge_answers(
    base: Sequence[Answer], adapter: Sequence[Answer], served: Sequence[Answer], places: Sequence[str], score: str
) -> dict[str, Any]:
    """Find whose answers a server gave: those of the adapter, of the base, or of neither, in figures and a sentence.

    They are a side's if most of them, in rows that both sides answer differently, are nearer to its own by chrF than to
    the other's and than these are to each other, and the score differs by no more than the interval of the difference.
    Equality would ask too much: the last digits of two programs differ, and a long answer may part somewhere.
    """
    texts = [(mine.text, other.text, found.text) for mine, other, found in zip(adapter, base, served, strict=True)]
    # nonsense is farther from both than these are from each other
    near = [
        (_likeness(found, mine), _likeness(found, other), chrf(other, mine))
        for mine, other, found in texts
        if mine != other
    ]
    nearer = {"adapter": sum(to_adapter > max(to_base, apart) for to_adapter, to_base, apart in near)}
    nearer[BASE] = sum(to_base > max(to_adapter, apart) for to_adapter, to_base, apart in near)
    gaps = {
        side: {name: _gap(name, answers, served) for name in answers[0].scores}
        for side, answers in (("adapter", adapter), (BASE, base))
    }
    fits = [
        side
        for side, of_scores in gaps.items()  # one score may be 0 for all: an exact match of free text
        if 2 * nearer[side] > len(near) and all(gap.low <= 0 <= gap.high for gap in of_scores.values())
    ]
    verdict, gap = (fits or ["neither"])[0], gaps["adapter"][score]
    rows, equal = len(texts), [sum(row[2] == row[side] for row in texts) for side in (0, 1)]
    figures: dict[str, Any] = {
        "verdict": verdict,
        "rows": rows,
        "differing_rows": len(near),
        "equal_to_adapter": equal[0] / rows,
        "equal_to_base": equal[1] / rows,
        "score": score,
        "difference_from_adapter": gap._asdict(),
    }
    if not near:
        sentence = f"Base and adapter answer these {rows:,} rows alike: nothing tells them apart."
        return {**figures, "verdict": "unknown", "sentence": sentence}
    names = {"adapter": "as the adapter", BASE: "as the base: it has not loaded the adapter", "neither": "like neither"}
    figures["sentence"] = (
        f"The server answers {names[verdict]}. {equal[0]:,} of {rows:,} answers are equal to the adapter's, "
        f"{equal[1]:,} to the base's; {score} differs from the adapter's by {gap.value:+.3f} "
        f"[{gap.low:+.3f}, {gap.high:+.3f}]."
    )
    if verdict == "neither":
        first = next((number for number, (mine, _, found) in enumerate(texts) if found != mine), 0)
        figures["first_difference"] = {"row": places[first], "adapter": texts[first][0], SERVED: texts[first][2]}
        figures["sentence"] += (
            f" First {places[first]}: {texts[first][2][:80]!r}, the adapter {texts[first][0][:80]!r}. Look at its chat "
            "template, its stop tokens and its quantization."
        )
    return figures


def _likeness(text: str, other: str) -> float:
    return 1.0 if text == other else chrf(text, other)  # which is 0 for two empty ones


def _gap(score: str, own: Sequence[Answer], served: Sequence[Answer]) -> Interval:
    """Return by how much the served answers' score differs from that of a side's own."""
    sides = {"own": own, SERVED: served}
    values = {name: [(each.figures[score], 1.0) for each in answers] for name, answers in sides.items()}
    return measure(score, values).differences[SERVED]
