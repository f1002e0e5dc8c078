"""What a stranger's file may cost: 4 GiB of memory and 60 seconds, then one sentence, whatever kind of file it is."""

import contextlib
import gzip
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_lightning import InstructionDataModule
from qlora_lightning.sources.folders import load_tokenizer
from qlora_lightning.support.errors import UserError, bounded
from tests.adapters import make_adapter
from tests.errors import rejects
from tests.report.conftest import write_run
from tests.rows import change_json, counting_rows, write_rows

MEMORY, TIME = "takes more than 4 GiB of memory", "takes more than 60 seconds"
FOR = "{% for i in range(99999) %}"


def arrow():
    column = pa.array(["x" * (1 << 28)])
    table = pa.table(dict.fromkeys(map(str, range(24)), column))
    with pa.ipc.new_file("a.arrow", table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)


def parquet():
    column = pa.array(["x" * 60_000_000] * 4).dictionary_encode()
    table = pa.table(dict.fromkeys(map(str, range(40)), column))
    pq.write_table(table, "a.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30)


def packed(name, start, part, count):
    """Write a gzip file of a beginning, and a part many times."""
    return lambda: Path(name).write_bytes(gzip.compress(start) + gzip.compress(part, 1) * count)


def labels():
    change_json(Path("base/config.json"), num_labels=60_000_000)


def layers():
    change_json(Path("base/config.json"), num_hidden_layers=10**9)


def template(text):
    def write():
        Path("base/chat_template.jinja").write_text(text + Path("base/chat_template.jinja").read_text())

    return write


def pattern():
    make_adapter(Path("adapter"), "base")
    change_json(Path("adapter/adapter_config.json"), rank_pattern={"(([a-z_.0-9]+)+)+!": 4})


def aliases():
    make_adapter(Path("run/adapter"), "base")
    lines = [f"    - &v{n} [{', '.join(9 * [f'*v{n - 1}'])}]" for n in range(1, 30)]
    Path("run/config.yaml").write_text("\n".join(["data:", "  train:", "    - &v0 rows.jsonl", *lines, ""]))


def checkpoint():
    archive = zipfile.ZipFile("a.ckpt", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("a/data.pkl", "w", force_zip64=True) as file:
        for _ in range(240):
            file.write(b"N" * 50_000_000)


def pipe():
    Path("rows").mkdir()
    os.mkfifo("rows/a.jsonl")


def links():
    for name in "abcd":
        Path("rows", name).mkdir(parents=True)
        for other in "abcd":
            Path("rows", name, other).symlink_to(f"../{other}")


def run_folder():
    Path("run").mkdir()
    write_run(Path("run"))
    Path("run/evaluation.json").write_text('{"samples": [' + "[]," * 70_000_000 + "0]}")


INSPECT = "inspect --model.base base --data.train"
COSTLY = [  # a command, words of its message, and what makes its file
    (f"{INSPECT} a.arrow", arrow, "a.arrow cannot be read", MEMORY),
    (f"{INSPECT} a.parquet", parquet, "a.parquet cannot be read", MEMORY),
    (f"{INSPECT} a.json.gz", packed("a.json.gz", b'[{"text": "a"}]', b" " * 50_000_000, 120), "a.json.gz", MEMORY),
    (f"{INSPECT} a.jsonl.gz", packed("a.jsonl.gz", b'{"text": "', b" " * 50_000_000, 120), "a.jsonl.gz", MEMORY),
    (
        f"{INSPECT} a.csv.gz",
        packed("a.csv.gz", b"text\n", b'"' + b"a" * 50_000_000 + b'",', 121),
        "a.csv.gz cannot be read",
        MEMORY,
    ),
    (f"{INSPECT} rows.jsonl", labels, "from base: correct its files, config.json too", MEMORY),
    ("plan --model.base base --data.train rows.jsonl", layers, "base/config.json describes no model that loads", TIME),
    (
        f"{INSPECT} rows.jsonl",
        template("{% if 'Count to 9' in messages[0].content %}" + 3 * FOR + 3 * "{% endfor %}" + "{% endif %}"),
        "rows.jsonl:9 cannot be rendered by the chat template",
        TIME,
    ),
    (f"{INSPECT} rows.jsonl", template("{% set x = 'a' * 6000000000 %}"), "the chat template of", MEMORY),
    ("chat --adapter adapter --prompt Hi", pattern, "adapter_config.json is not the config of a LoRA adapter", TIME),
    ("evaluate --adapter run/adapter", aliases, "run/config.yaml cannot be read", TIME),
    (
        "fit --model.base base --data.train rows.jsonl --ckpt_path a.ckpt",
        checkpoint,
        "a.ckpt cannot be read",
        "compressed",
    ),
    (f"{INSPECT} 'rows/*.jsonl'", pipe, "rows/*.jsonl"),
    (f"{INSPECT} rows", links, "rows/** cannot be listed", TIME),
    ("report run", run_folder, "run/evaluation.json cannot be read", MEMORY),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "prepare", "words"),
    [pytest.param(line, make, words, id=words[0].replace("/", " ")) for line, make, *words in COSTLY],
)
def test_what_costs_too_much_is_one_sentence(line, prepare, words, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, "base")
    write_rows(Path("rows.jsonl"), counting_rows())
    prepare()
    program = f"ulimit -v 12000000; exec {sys.executable} -m qlora_lightning {line}"
    began = time.monotonic()
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    message = done.stderr.rpartition("qlora-lightning: ")[2]
    assert [word for word in words if word not in message] == [], message
    assert time.monotonic() - began < 120


def limits():
    return resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGALRM), signal.getitimer(0)[0] > 0


def wait():
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


def test_blocks_may_be_nested_and_all_is_as_before_after_them(monkeypatch):
    monkeypatch.setattr("qlora_lightning.support.errors.MOST_SECONDS", 0.3)
    own = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 100)
    before = limits()
    try:
        with rejects("outer", "second part (it takes more than"), bounded("first part", "outer") as begin:
            for _ in range(3):
                time.sleep(0.2)
                begin("second part")
            with rejects("inner", "inner (it takes more than 0.3 seconds"), bounded("inner", "inner"):
                wait()
            with bounded("short", "short"):
                inside = limits()
            assert limits() == inside  # of the outer one
            wait()
        assert inside != before
        with pytest.raises(KeyError), bounded("", ""):
            {}["as it is"]
        assert limits() == before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, own)


def slow_function(row):
    time.sleep(1.1)
    return [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.slow
def test_a_users_own_function_has_no_bound_and_a_template_beside_it_has(tiny_base, tmp_path, monkeypatch):
    write_rows(tmp_path / "a.jsonl", [{"text": "How?"}, {"text": "Long?"}])
    tokenizer = load_tokenizer(str(tiny_base))
    monkeypatch.setattr("qlora_lightning.support.errors.MOST_SECONDS", 2)
    InstructionDataModule(tmp_path / "a.jsonl", tokenizer=tokenizer, format=slow_function).setup("fit")
    loops = "{% if messages[0].content == 'Long?' %}" + 3 * FOR + 3 * "{% endfor %}" + "{% endif %}"
    tokenizer.chat_template = loops + tokenizer.chat_template
    data = InstructionDataModule(tmp_path / "a.jsonl", tokenizer=tokenizer, format=slow_function)
    with rejects("chat_template.cost", "a.jsonl:2 cannot be rendered", "takes more than 2 seconds"):
        data.setup("fit")
    data = InstructionDataModule(predict=tmp_path / "a.jsonl", tokenizer=tokenizer, format=slow_function)
    with rejects("chat_template.cost", "a conversation cannot be rendered", "takes more than 2 seconds"):
        data.setup("predict")


def test_a_thread_has_the_bound_on_memory_alone(monkeypatch):
    monkeypatch.setattr("qlora_lightning.support.errors.MOST_SECONDS", 0.05)
    monkeypatch.setattr("qlora_lightning.support.errors.MOST_GIB", 0.25)
    before, errors = limits(), []

    def work():
        try:
            with bounded("much", "key"):
                time.sleep(0.1)
                bytearray(1 << 29)
        except UserError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors[0].startswith("much (it takes more than 0.25 GiB of memory")
    assert limits() == before
    assert len(bytearray(1 << 29)) == 1 << 29
