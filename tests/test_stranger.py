"""What a stranger's folder may do when our commands look at it: nothing. Nothing runs, nothing is written elsewhere."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from qlora_lightning.cli import main
from qlora_lightning.report import write_manifest
from tests.adapters import make_run
from tests.equality import contents
from tests.report.conftest import MANIFEST

ESCAPE = "\x1b]0;owned\x07"  # sets a terminal's title
CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n\nclass Evil: ...\ndef rows(row): ...\n"


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory):
    """A run folder from elsewhere, beside its base, a module of code, and a file of the user's."""
    place = tmp_path_factory.mktemp("stranger")
    base = shutil.copytree(tiny_base, place / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Evil"}, "_attn_implementation": "evil/kernel"}
    config |= {"attn_implementation": "evil/kernel", "kernel_config": {"RMSNorm": "evil/kernel:Norm"}}
    config |= {"use_kernels": True, "fusion_config": {"evil": True}, "transformers_weights": "other.safetensors"}
    (base / "config.json").write_text(json.dumps(config))
    make_run(place / "run", base)
    for name in ("evil.py", "base/evil.py", "run/evil.py"):
        (place / name).write_text(CODE)
    output = f"a{ESCAPE}{'z' * 400}"
    rows = [{"instruction": f"[bold]Touch{ESCAPE}{n}", "output": output, f"key{ESCAPE}": "x"} for n in range(6)]
    data = place / "run" / f"val{ESCAPE}.jsonl".replace("/", "")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": {"base": str(base), "optimizer": "evil.Evil", "trust_remote_code": True, "init_args": {"x": "evil.X"}},
        "trainer": {"default_root_dir": str(place / "run"), "callbacks": [{"class_path": "evil.Evil"}]},
    }
    settings["data"] = {"val": {"path": str(place / "run" / "val*.jsonl"), "columns": {"key": None}}}
    settings["data"]["tokenizer"] = {"name": "base", "trust_remote_code": True}
    (place / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    tokenizer = place / "run" / "adapter" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    escapes = {"type": "Replace", "pattern": {"String": "g"}, "content": ESCAPE}
    content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], escapes]}
    tokenizer.write_text(json.dumps(content))
    manifest = {"status": f"finished{ESCAPE}", "config": settings, "error": ESCAPE}
    write_manifest(place / "run", {**MANIFEST, **manifest})
    (place / "victim").write_text('{"key": "mine"}')
    (place / "run" / "adapter" / "generation_config.json").unlink()
    (place / "run" / "adapter" / "generation_config.json").symlink_to(place / "victim")
    for name in ("report.html", "report.html.unfinished"):
        (place / "run" / name).symlink_to(place / "victim")
    return place


@pytest.mark.parametrize(
    "line",
    [
        "evaluate --adapter run/adapter --rows 4 --max-new-tokens 4 --show 4 --out FOUND",
        "merge --adapter run/adapter --out OUT --rows 2",
        "chat --adapter run/adapter --prompt here --max-new-tokens 8 --base base",
        "report run",
    ],
)
def test_a_strangers_folder_runs_nothing_writes_nothing_elsewhere_and_prints_no_escape(
    line, folder, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(folder)
    before = contents(folder)
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "predictions.unfinished.jsonl").symlink_to(tmp_path / "made")  # which is not there yet
    code = main(line.replace("OUT", str(tmp_path / "out")).replace("FOUND", str(tmp_path / "found")).split())
    out, err = capfd.readouterr()
    assert code == 0, err
    assert not [text for text in (out, err) if any(each in text for each in ("\x1b", "\x07"))]
    assert not list(folder.rglob("ran"))
    assert not (tmp_path / "made").exists()
    after = contents(folder)
    after.pop("run/report.html", None)
    assert after == before
    if line.startswith("evaluate"):
        assert "[bold]Touch␛]0;owned" in out
        assert 500 < out.count("z") < 700  # of two expected answers, each 300 characters
    if line.startswith("merge"):
        written = "".join(file.read_text() for file in (tmp_path / "out").glob("*config.json"))
        assert not {"auto_map", "mine"} & set(written.split('"'))


@pytest.mark.slow
def test_names_of_files_are_neither_code_nor_addresses_and_no_link_is_copied(folder, tmp_path, monkeypatch, capsys):
    place = shutil.copytree(folder, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(place)
    for name in ("bank.py", "brotlicffi.py"):
        (place / name).write_text(CODE)
    row = '{"instruction": "Say 1.", "output": "1"}\n'
    for name in ("data-bank.jsonl", "reference::victim.jsonl", "~/rows.jsonl"):
        file = place / "rows" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(row)
        shutil.copy(file, place / file.name)
    (place / "victim.jsonl").write_text('{"version": 1, "refs": {"": ["victim", 0, 9]}}')
    command = [
        sys.executable,
        "-m",
        "qlora_lightning",
        *["inspect", "--data.train", "data-bank.jsonl", "--model.base", "base"],
    ]
    subprocess.run(command, cwd=place, check=True, capture_output=True)
    assert not list(place.rglob("ran"))
    assert main(["inspect", "--data.train", "reference::victim.jsonl", "--model.base", "base"]) == 0
    assert main(["inspect", "--data.train", "rows", "--model.base", "base"]) == 0
    (place / "run/adapter/chat_template.jinja").unlink(missing_ok=True)
    (place / "run/adapter/chat_template.jinja").symlink_to(place / "victim")
    assert main(["merge", "--adapter", "run/adapter", "--out", "out", "--rows", "0"]) == 2
    assert "chat_template.jinja is a link" in capsys.readouterr().err


def test_no_module_of_a_strangers_folder_is_imported_and_no_log_has_an_escape(folder, tmp_path):
    for name in ("argcomplete", "brotlicffi", "lz4", "mpi4py", "zstandard"):  # which libraries try to import
        (folder / f"{name}.py").write_text(CODE)
    (folder / f"base{ESCAPE}").symlink_to("base")
    command = [sys.executable, "-m", "qlora_lightning", "evaluate", "--adapter", "run/adapter", "--rows", "1"]
    command += ["--max-new-tokens", "1", "--model.base", f"base{ESCAPE}"]
    env = {**os.environ, "QLORA_LIGHTNING_CACHE": str(tmp_path)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(folder.rglob("ran"))
    assert "Quantizing base␛]0;owned" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "class_path", "evil.Evil"),
        ("data", "format", "evil.rows"),
        ("data", "val", "[{path: val.jsonl, format: evil.rows}] # *"),
        ("evaluation", "scores", ["exact_match", "evil.rows"]),
        ("data", "val", ["val.jsonl", "https://localhost:9/rows.jsonl"]),
        ("data", "val", {"path": "org/rows", "split": "train"}),
        ("data", "val", {"path": "val.jsonl", "format": '"subprocess\\u002ecall"'}),
    ],
)
def test_a_config_that_would_run_code_or_fetch_rows_is_not_taken(
    section, key, value, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(folder)
    run = shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
    settings = {"model": {"base": "base"}, "data": {"val": "val.jsonl"}}
    settings.setdefault(section, {})[key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "val.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    assert main(["evaluate", "--adapter", str(run / "adapter")]) == 2
    captured = capsys.readouterr()
    assert f"would run code or fetch rows: {section}.{key}: " in captured.out
    assert f"`--config {run / 'config.yaml'}` takes it" in captured.out
    assert "Nothing names the rows" in captured.err
    assert not list(folder.rglob("ran"))


def test_a_fit_follows_no_link_to_a_file(tiny_base, rows_file, tmp_path):
    """But for the run folder itself, which the user names."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    names = ("checkpoints/unfinished", "report.html", "manifest.json", "config.yaml")
    for number, name in enumerate(names):
        (tmp_path / f"victim-{number}").write_text("mine")
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).symlink_to(tmp_path / f"victim-{number}")
    (tmp_path / "run" / "manifest.json").unlink()  # it would be read
    os.mkfifo(tmp_path / "run" / "manifest.json")
    line = f"fit --model.base {tiny_base} --data.train {rows_file} --trainer.default_root_dir {tmp_path / 'run'}"
    assert main(f"{line} --trainer.accelerator cpu --trainer.max_steps 1 --evaluation null".split()) == 0
    assert [(tmp_path / f"victim-{number}").read_text() for number in range(len(names))] == ["mine"] * len(names)
    assert (tmp_path / "disk" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("command", "name"),
    [("fit", "checkpoints"), ("fit", "adapter"), ("sweep --ranks 2,4 --data.val_fraction 0.2", "sweep")],
)
def test_no_run_writes_into_a_folder_behind_a_link(command, name, tiny_base, rows_file, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (link := tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    line = f"{command} --model.base {tiny_base} --data.train {rows_file} --trainer.default_root_dir {tmp_path / 'run'}"
    assert main(f"{line} --trainer.accelerator cpu --trainer.limit_train_batches 1".split()) == 2
    assert f"{link} is a link, " in capsys.readouterr().err
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles")
def test_compiled_code_is_kept_in_the_users_own_folder(cache):
    program = "import logging; logging.basicConfig()\n"
    program += "from qlora_lightning.model.cpu.library import load_library; print(load_library() is not None)"
    result = subprocess.run(["python", "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout + result.stderr == "True\n"
    assert not cache.exists()  # a folder that QLORA_LIGHTNING_CACHE names may be anybody's
    assert len(list((cache.parent / "of_user" / "qlora_lightning").glob("kernels/*/kernels.so"))) == 1
