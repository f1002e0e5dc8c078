import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
import yaml

from qlora_lightning.cli import main

LINES = "qlora_lightning.callbacks.progress_bar.ProgressLines"
CONFIG = {
    "seed_everything": 3,
    "model": {"base": "tiny", "rank": 2},
    "data": {"train": "rows.jsonl", "val": "rows.jsonl", "batch_size": 4},
    "evaluation": None,
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "accumulate_grad_batches": 2,
        "max_epochs": 3,
        "limit_val_batches": 2,
        "num_sanity_val_steps": 0,
        "default_root_dir": "run",
    },
}
FIT = ["fit", "--config", "c.yaml"]
COMMAND = [sys.executable, "-m", "qlora_lightning", *FIT]
NUMBERS = r"loss \d+\.\d{3}, (val \d+\.\d{3}, )?lr [\d.e+-]+, \d+ tok/s, \d+\.\d\d GiB, \d:\d\d:\d\d left"


@pytest.fixture(autouse=True)
def _folder(tiny_base, rows_file, tmp_path, monkeypatch):
    """A folder with c.yaml and what it names; rows_file makes rows.jsonl there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_base)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))


def progress(text):
    return [line for line in text.splitlines() if line.startswith(("step", "validating"))]


def test_a_log_file_has_a_line_after_the_first_step_and_at_the_end_and_no_bars():
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(COMMAND, capture_output=True, text=True, check=True, env=environment)
    first, last = progress(done.stdout)
    assert re.fullmatch(rf"step 1/6, epoch 1/3, {NUMBERS}", first)
    assert re.fullmatch(rf"step 6/6, epoch 3/3, {NUMBERS}", last)
    assert not re.search(r"[\r\x1b]|it/s", done.stdout + done.stderr)


def test_lines_come_as_often_as_asked_and_from_validations_too(capsys):
    own = {"callbacks": [{"class_path": LINES, "init_args": {"every_seconds": 0}}]}
    with open("c.yaml", "w") as file:
        yaml.safe_dump({**CONFIG, "trainer": {**CONFIG["trainer"], **own}}, file)
    assert main(FIT) == 0
    lines = [line.split(", loss")[0] for line in progress(capsys.readouterr().out)]
    expected = []
    for epoch in (1, 2, 3):
        expected += [f"step {step}/6, epoch {epoch}/3" for step in (2 * epoch - 1, 2 * epoch)]
        expected += ["validating 1/2", "validating 2/2"]
    assert lines == expected


def test_the_bar_fits_into_a_terminal_of_80_columns_with_all_its_numbers():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(COMMAND, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                written += os.read(ours, 65_536)
            except OSError:  # all of it is read, and nobody writes any more
                break
    os.close(ours)
    assert process.returncode == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    drawn = [line for line in re.split(r"[\r\n]+", plain) if " loss " in line]
    assert {line.split()[2] for line in drawn} == {"1/3", "2/3", "3/3"}
    numbers = r"4/4 Epoch 3/3 -\d:\d\d:\d\d loss [\d.]+ val [\d.]+ lr [\d.e-]+ "
    speed = r"(\d{1,4} tok/s [\d.]+ GiB [╸━╺]+ ?|\d{5,} tok/s [\d.]+ GiB *)"  # beside five digits there is no bar
    whole = [line for line in drawn if re.fullmatch(numbers + speed, line)]
    assert whole
    assert max(map(len, whole)) <= 80
    assert progress(plain) == []
