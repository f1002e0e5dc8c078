"""A server beside base and adapter: it answers the same rows, and is judged by whose answers they are."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx
from rich.progress import track

from qlora_lightning.evaluation import BASE
from qlora_lightning.evaluation.intervals import measure
from qlora_lightning.evaluation.row_results import Answer, AnswerSettings, EvaluationRow, RowResult
from qlora_lightning.evaluation.scores import chrf
from qlora_lightning.support.console import terminal
from qlora_lightning.support.errors import UserError

KEY_VARIABLE = "OPENAI_API_KEY"  # in the environment; it goes into a header, and nowhere else
SERVED = "served"
NOTHING = RowResult(math.nan, 0, 0)  # of a server's losses


class ServedAnswer(NamedTuple):
    """What a server answered.

    Attributes:
        text: Without space around it; calls of tools as Hermes and Qwen write them.
        tokens: How many it counts; 0 if it does not say.
        stopped: Whether it ended by itself, and not at the limit.
        prompt_tokens: How many tokens it counts in the prompt; ``None`` if it does not say.
    """

    text: str
    tokens: int
    stopped: bool
    prompt_tokens: int | None


class Server:
    """An inference server that speaks OpenAI's chat completions.

    Args:
        url: Up to and with its version: ``http://localhost:8000/v1``.
        name: Of the served model; ``None`` if there is only one.
        timeout: Seconds that an answer may take.
        parallel: Requests at a time.

    Raises:
        UserError: Nothing answers there, or it serves no model of that name.
    """

    def __init__(self, url: str, name: str | None, timeout: float, parallel: int) -> None:
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        self._headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self.url, self.parallel, self._timeout = url.rstrip("/"), parallel, timeout
        served = [model["id"] for model in self._send("GET", "models").get("data") or []]
        if name is None and len(served) == 1:
            name = served[0]
        elif name not in served and f"{name}:latest" in served:  # as Ollama completes it
            name = f"{name}:latest"
        if name is None or (served and name not in served):
            asked = "Name a model by --served-name" if name is None else f"It serves no {name}"
            raise UserError(f"--server {url}: {asked}: expected one of {', '.join(served)}.")
        self.name = name

    def answer(self, requests: Sequence[Mapping[str, Any]]) -> list[ServedAnswer]:
        """Answer chat requests greedily, several at a time, in their order, and show how many are done."""
        with ThreadPoolExecutor(self.parallel) as pool:
            answers = pool.map(self._answer, requests)
            return list(track(answers, "server", len(requests), console=terminal(stderr=True), transient=True))

    def _answer(self, request: Mapping[str, Any]) -> ServedAnswer:
        greedy = {"temperature": 0.0, "repetition_penalty": 1.0}  # vLLM takes the latter from the base's files
        found = self._send("POST", "chat/completions", {"model": self.name, **greedy, **request})
        if not found.get("choices"):
            raise UserError(f"--server {self.url} gives no answer: {self._hide_key(str(found))}")
        choice, usage = found["choices"][0], found.get("usage") or {}
        message = choice["message"]
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        texts = [f"<think>\n{thoughts.strip()}\n</think>\n"] if thoughts else []
        texts.append(message.get("content") or "")
        for call in message.get("tool_calls") or []:
            function = {"name": call["function"]["name"], "arguments": _parse(call["function"]["arguments"])}
            texts.append(f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>")
        return ServedAnswer(
            "\n".join(texts).strip(),
            usage.get("completion_tokens", 0),
            choice.get("finish_reason") in ("stop", "tool_calls"),
            usage.get("prompt_tokens"),
        )

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            response = httpx.request(
                method, f"{self.url}/{path}", json=body, headers=self._headers, timeout=self._timeout
            )
            if response.is_success:
                return response.json()
        except httpx.TimeoutException as error:
            raise UserError(f"--server {self.url} did not answer in time: --timeout gives it more.") from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise UserError(
                f"--server {self.url} gives no OpenAI answer to /{path}: {self._hide_key(error)}"
            ) from error
        text = self._hide_key(response.text)
        hint = f" A key is taken from {KEY_VARIABLE}." if response.status_code in (401, 403) else ""
        raise UserError(f"--server {self.url} answered /{path} with {response.status_code}: {text}{hint}")

    def _hide_key(self, words: object) -> str:
        text = " ".join(str(words).split())[:300]
        return text.replace(self._key, "…") if self._key else text


@dataclass(frozen=True)
class Verdict:
    """Whose answers a server gave.

    Attributes:
        served: ``adapter``, ``base`` or ``neither``.
        sentence: Of it, for people.
        figures: Of it, for programs.
    """

    served: str
    sentence: str
    figures: dict[str, Any]


def make_requests(data: Any, split: str, rows: Sequence[EvaluationRow]) -> list[dict[str, Any]]:
    """Return a chat request for each row that has a prompt, of the messages that its file has.

    A row that is no conversation, or of which several samples were made, gets no prompt any more: it is not answered.
    """
    pieces = Counter(row.number for row in rows)
    chats = data.load_conversations(split, set(pieces))
    requests = []
    for row in rows:
        chat = chats.get(row.number)
        if chat is None or pieces[row.number] > 1:
            row.prompt = None
        if chat is None or row.prompt is None:
            continue
        answers = [
            at for at, each in enumerate(chat.messages) if each["role"] == "assistant" and each.get("train", True)
        ]
        request: dict[str, Any] = {"messages": list(map(_to_openai, chat.messages[: answers[-1]]))}
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


def _parse(arguments: Any) -> Any:
    try:
        return json.loads(arguments)
    except (TypeError, ValueError):  # an object already; cut at the limit of tokens
        return arguments


def judge_server(
    answers: Sequence[ServedAnswer],
    rows: Sequence[EvaluationRow],
    settings: AnswerSettings,
    results: dict[str, list[RowResult]],
) -> Verdict:
    """Score a server's answers of the rows that have a prompt, add them to ``results``, and judge them."""
    asked = [index for index, row in enumerate(rows) if row.prompt is not None]
    adapter = next(side for side in results if side != BASE)
    served, prompts = [NOTHING] * len(results[BASE]), []
    for index, found in zip(asked, answers, strict=True):
        row = rows[index]
        scores = settings.score(found.text, row)
        served[index] = NOTHING._replace(answer=Answer(found.text, found.tokens, found.stopped, scores))
        prompts.append((row.place, len(row.prompt or ()), found.prompt_tokens))
    results[SERVED] = served
    sides = {BASE: BASE, "adapter": adapter, SERVED: SERVED}
    texts = {
        name: [answer for index in asked if (answer := results[side][index].answer)] for name, side in sides.items()
    }
    expected = [settings.decode(rows[index].expected) for index in asked]
    return judge(texts, expected, prompts, settings.scores[0])


def judge(
    answers: Mapping[str, Sequence[Answer]],
    expected: Sequence[str],
    prompts: Sequence[tuple[str, int, int | None]],
    score: str,
) -> Verdict:
    """Find whose answers a server gave: those of the adapter, of the base, or of neither.

    They are a side's if most of them, in rows that both sides answer differently, are nearer to its own by chrF than to
    the other's and than these are to each other, and the score differs by no more than the interval of the difference;
    for the adapter chrF beside what was expected too. Equality would ask too much: the last digits of two programs
    differ, and a long answer may part somewhere without a fault.

    Args:
        answers: By side: ``base``, ``adapter`` and ``served``, of the same rows.
        expected: What each row answers.
        prompts: Of each row, where it is from, the tokens of its prompt, and how many the server counted.
        score: Name of the score that counts.
    """
    base, adapter, served = (answers[side] for side in (BASE, "adapter", SERVED))
    texts = [(mine.text, other.text, found.text) for mine, other, found in zip(adapter, base, served, strict=True)]
    telling = [row for row in texts if row[0] != row[1]]
    nearer = {"adapter": 0, BASE: 0}
    for mine, other, found in telling:
        to_adapter, to_base = ((found == text, chrf(found, text)) for text in (mine, other))
        apart = (False, chrf(other, mine))  # nonsense is farther from both than these are from each other
        nearer["adapter"] += to_adapter > max(to_base, apart)
        nearer[BASE] += to_base > max(to_adapter, apart)
    equal = {"adapter": sum(row[2] == row[0] for row in texts), BASE: sum(row[2] == row[1] for row in texts)}
    verdict, differences = "neither", {}
    for side in (BASE, "adapter"):
        pair = {name: [(each.figures[score], 1.0) for each in answers[name]] for name in (side, SERVED)}
        difference = differences[side] = measure(score, pair).differences[SERVED]
        gaps = [difference]
        if side != BASE:  # which answers otherwise in other bits, and talks freely
            overlaps = {
                name: [(chrf(each.text, text), 1.0) for each, text in zip(answers[name], expected, strict=True)]
                for name in (side, SERVED)
            }
            gaps.append(measure("chrf", overlaps).differences[SERVED])
        if 2 * nearer[side] > len(telling) and all(each.low <= 0 <= each.high for each in gaps):
            verdict = side
    gap = differences["adapter"]
    figures: dict[str, Any] = {
        "verdict": verdict,
        "rows": len(texts),
        "telling_rows": len(telling),
        "equal_to_adapter": equal["adapter"] / len(texts),
        "equal_to_base": equal[BASE] / len(texts),
        "score": score,
        "difference_from_adapter": gap._asdict(),
    }
    share = f"{equal['adapter']:,} of {len(texts):,} answers are equal to the adapter's, {equal[BASE]:,} to the base's"
    change = f"{score} differs from the adapter's by {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
    if verdict == BASE:
        sentence = (
            f"The server answers as the base: it has not loaded the adapter ({share}). Look at the names that the"
        )
        return Verdict(verdict, f"{sentence} server logs when it loads the adapter, and at --served-name.", figures)
    others = [(where, ours, theirs) for where, ours, theirs in prompts if theirs not in (None, ours)]
    if others:
        where, ours, theirs = others[0]
        figures["prompt_tokens"] = {"row": where, "ours": ours, "server": theirs, "rows": len(others)}
    template = (
        f" Its prompts are others in {len(others):,} rows (that of {others[0][0]} has {others[0][2]:,} tokens, in "
        f"training {others[0][1]:,}): compare its chat template."
        if others
        else ""
    )
    if verdict == "adapter":
        return Verdict(verdict, f"The server answers as the adapter: {share}; {change}.{template}", figures)
    if not telling:
        return Verdict(
            verdict, f"Base and adapter answer these {len(texts):,} rows alike: nothing tells them.", figures
        )
    first = next((number for number, row in enumerate(texts) if row[2] != row[0]), 0)
    figures["first_difference"] = {
        "row": prompts[first][0],
        "adapter": texts[first][0],
        SERVED: texts[first][2],
    }
    looks = "" if template else " Its prompts have as many tokens as in training."
    if sum(each.stopped for each in served) < sum(each.stopped for each in adapter):
        looks += " Fewer of its answers end by themselves: look at its stop tokens."
    sentence = (
        f"The server answers like neither base nor adapter: {share}; {change}. First {prompts[first][0]}: "
        f"{texts[first][2][:80]!r}, the adapter {texts[first][0][:80]!r}.{template}{looks} What is left is "
        "quantization: compare an export in f16."
    )
    return Verdict(verdict, sentence, figures)
