"""A log file has lines of progress, a terminal a bar."""

import os
import pty
import re
import sys

import pytest

LINES = "qlora_lightning.callbacks.progress_bar.ProgressLines"
FIT = ("--trainer.enable_progress_bar=true", "--trainer.default_root_dir=new", "--trainer.num_sanity_val_steps=0")
FIT = (*FIT, "--evaluation=null", "--trainer.max_epochs=2")
NUMBERS = r"loss \d+\.\d{3}, (val \d+\.\d{3}, )?lr [\d.e+-]+, tok/s \d+, GiB \d+\.\d\d, \d:\d\d:\d\d left"


def progress(text):
    return [line for line in text.splitlines() if line.startswith(("step", "validating"))]


def test_a_log_file_has_a_line_after_the_first_step_and_at_the_end_and_no_bars(command):
    written = command("fit", *FIT)
    first, last = progress(written)
    assert re.fullmatch(rf"step 1/6, epoch 1/2, {NUMBERS}", first)
    assert re.fullmatch(rf"step 6/6, epoch 2/2, {NUMBERS}", last)
    assert not re.search(r"[\r\x1b]|it/s", written)


@pytest.mark.slow
def test_lines_come_as_often_as_asked(command, write_config):
    callback = {"class_path": LINES, "init_args": {"every_seconds": 0}}
    config = write_config(trainer={"callbacks": [callback], "limit_val_batches": 2})
    lines = [line.split(", loss")[0] for line in progress(command("fit", *FIT, config=config))]
    assert lines == [f"step {step}/6, epoch {(step + 2) // 3}/2" for step in range(1, 7)]


@pytest.mark.slow
@pytest.mark.usefixtures("command")
@pytest.mark.filterwarnings("ignore:.*use of forkpty:DeprecationWarning")  # its child becomes another program at once
def test_the_bar_has_all_its_numbers_in_a_terminal_of_80_columns(monkeypatch):
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setenv("TERM", "xterm")
    written = []

    def keep(terminal):
        written.append(os.read(terminal, 65_536))
        return written[-1]

    assert pty.spawn([sys.executable, "-m", "qlora_lightning", "fit", "--config", "c.yaml", *FIT], keep) == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(written).decode())
    numbers = r"Epoch 1/1 +5/5 \d\d:\d\d loss: [\d.]+ val: [\d.]+ lr: [\d.e-]+ tok/s: \d+ GiB:"
    assert any(re.match(numbers, line) for line in re.split(r"[\r\n]+", plain))
    assert progress(plain) == []
