"""The path of a GPU without a GPU: on the stub of card.c, in processes of their own.

On compute capability 9.0 and 10.0 each would fail if torch took cuDNN's attention, which the stub has not.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.processes import run_python

pytestmark = [
    pytest.mark.stub_gpu,
    pytest.mark.skipif(torch.version.cuda is None, reason="takes a torch that was built for CUDA"),
    pytest.mark.skipif(not (shutil.which("cc") and shutil.which("nm")), reason="takes a C compiler"),
]
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}  # which the command sets, before CUDA starts


@pytest.fixture(scope="session")
def stub(tmp_path_factory):
    from tests.gpu.stub import build_stub  # asks for Triton

    return build_stub(tmp_path_factory.mktemp("stub"))


@pytest.fixture
def on_card(stub, tmp_path):
    def run(name, capability, gib, **variables):
        """Run a function of on_card.py; return what it found, and all that was printed."""
        variables |= {"STUB_CC": str(capability), "STUB_MIB": str(gib << 10)}
        variables["QLORA_LIGHTNING_CACHE"] = str(tmp_path / "cache")
        ours = {key: value for key, value in os.environ.items() if key != "PYTORCH_ALLOC_CONF"}
        options = {"cwd": Path(__file__).parents[2], "env": {**ours, **stub, **variables}, "timeout": 600}
        done = run_python("-m", "tests.gpu.on_card", name, tmp_path, **options)
        return json.loads(done.stdout.splitlines()[-1]), done.stdout

    return run


def test_the_command_trains_evaluates_and_resumes_and_never_holds_two_bases(on_card):
    found, printed = on_card("whole", 80, 16, **EXPANDABLE)
    assert found == {"steps": [1, 2, 3, 4, 5, 6, 7, 8], "answered": 4}
    first, second, _ = map(float, re.findall(r"Memory after loading: (\d\.\d+) GiB", printed))
    assert first < 1.5 * second
    assert "PYTORCH_ALLOC_CONF" not in printed


def test_an_old_card_trains_preferences_in_fp16_and_they_are_merged(on_card):
    found, printed = on_card("preferences", 75, 8)
    assert found["merged"]
    assert "This CUDA has no bf16: products are computed in float16." in printed


def test_out_of_memory_anywhere_is_survived_or_one_sentence(on_card):
    found, printed = on_card("scarce", 90, 16, **EXPANDABLE)
    words = r"Out of memory on cuda:0 while .* was loaded: CUDA out of memory\. .* is free\. Stop .*"
    assert re.fullmatch(words, found["loaded"][0])
    sentence, is_not_loaded = found["planned"]
    assert "does not fit: with gradient checkpointing, its inputs in host memory one row of" in sentence
    assert is_not_loaded
    assert found["ample"] == found["evaluation"]
    assert "Not evaluated at step 2: CUDA out of memory." in printed
    plain, checkpointed = "without gradient checkpointing", "with gradient checkpointing"
    share, choice, unfinished = found["forward"]
    assert (choice, unfinished > 1) == (plain, True)
    assert 0.3 < share < 0.5  # half of what forward takes was left
    assert found["backward"] == [pytest.approx(0.8, abs=0.001), checkpointed, 0]
    assert found["validation"][0] < 1
    share, choice, _ = found["row"]  # of four; one does not fit, and with checkpointing two do
    assert (choice, 0.5 < share < 1) == (checkpointed, True)


def test_steps_take_the_memory_that_is_planned_and_ragged_ones_fit_at_once(on_card):
    found, _ = on_card("memory", 89, 24, **EXPANDABLE)
    for choice in ("plain", "plain in fp32", "checkpointed", "offloaded"):
        peak, planned = found[choice]
        assert 0.97 * planned < peak < planned
    assert found["retries"] == 0
    allocated, peaks, reserved = (found[name] for name in ("allocated", "peak", "reserved"))  # GiB of each ragged step
    assert all(held < peak <= most for held, peak, most in zip(allocated, peaks, reserved, strict=True))
    assert sorted(peaks) != peaks  # each is of its own step


def test_the_peak_of_an_int8_base_and_of_preferences_is_what_was_planned(on_card):
    found, _ = on_card("kinds", 80, 24, **EXPANDABLE)
    assert set(found) == {"int8 plain", "int8 checkpointed", "dpo"}
    for peak, planned in found.values():
        assert 0.97 * planned < peak < planned


def test_a_layer_takes_few_launches_and_the_host_waits_once_a_step(on_card):
    found, printed = on_card("launches", 100, 8)
    forward, backward = found["layer"]
    assert forward <= 32
    assert backward <= 47
    assert found["passes"] == [0, 0]  # waits and reads
    assert found["steps"][1:] == [[1, 1]] * 5  # the first makes what is made once
    assert printed.count("set PYTORCH_ALLOC_CONF=expandable_segments:True") == 1  # by Python CUDA starts too early


@pytest.mark.parametrize("capability", [75, 90])
def test_the_check_of_a_first_start_is_small_and_what_it_finds_is_planned(on_card, capability):
    found, printed = on_card("check", capability, 16, **EXPANDABLE)
    for launches, reads, gib in found.values():
        assert launches <= 800
        assert reads <= 60
        assert gib <= 0.4
    assert printed.count("computes something else than the libraries: layer output (1, allowed 0.06)") == 1
    healthy, faulty = (int(each.replace(",", "")) for each in re.findall(r"At most ([\d,]+) tokens go", printed))
    assert faulty < healthy


def test_many_samples_take_the_launches_of_few_on_an_old_card_and_in_fp32(on_card):
    found, _ = on_card("rows", 75, 8)
    for few, many in found.values():
        assert few == many


def test_the_stages_of_a_first_hour_on_a_card_run_to_their_ends(stub, tmp_path):
    """Their figures mean nothing here. Tests that compare numbers, compute-sanitizer and CUPTI take a card."""
    variables = {"STUB_CC": "90", "STUB_MIB": str(80 << 10), "STAGES_LAYERS": "2", "STAGES_PROFILED": "CPU"}
    options = {"cwd": Path(__file__).parents[2], "env": {**os.environ, **stub, **variables}, "timeout": 900}
    names = ("machine", "check", "memory", "kernels", "profile", "peers")
    done = run_python("-m", "tests.gpu.stages", tmp_path, *names, **options)
    ends = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert {name for name, end in ends.items() if end.startswith("exit code 0 ")} == {*names}, done.stdout
