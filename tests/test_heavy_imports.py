import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lightning.support.imports import _is_machine_busy, quick_imports, without_garbage_collection


def test_collector_is_paused_inside_and_on_again_afterwards() -> None:
    with without_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with without_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_was_made_meanwhile_is_old_afterwards() -> None:
    with without_garbage_collection():
        made: list[object] = [[]]
        assert any(item is made for item in gc.get_objects(generation=0))
    assert any(item is made for item in gc.get_objects(generation=2))
    assert gc.get_freeze_count() == 0


def test_what_a_program_froze_stays_frozen() -> None:
    marked: list[object] = [[]]
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with without_garbage_collection():
            pass
        assert 0 < gc.get_freeze_count() <= frozen  # fewer where one of them has died
        assert not any(item is marked for item in gc.get_objects())  # it is in no generation
    finally:
        gc.unfreeze()


def test_failed_import_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), without_garbage_collection():
        raise ImportError
    assert gc.isenabled()


def test_nothing_is_compiled_while_modules_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    with quick_imports():
        assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
        assert not gc.isenabled()
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    assert gc.isenabled()


def test_what_the_user_says_of_the_compiler_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    with quick_imports():
        assert os.environ["TORCHDYNAMO_DISABLE"] == "0"
    assert os.environ["TORCHDYNAMO_DISABLE"] == "0"


@pytest.mark.parametrize(
    "imported", ["from qlora_lightning import QLoRAModule", "import qlora_lightning.commands.training"]
)
def test_no_way_into_the_package_imports_the_compiler(imported: str) -> None:
    code = f"import sys; {imported}; print('torch._inductor.compile_fx' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


@pytest.mark.parametrize("is_installed", [True, False])
def test_bitsandbytes_fetches_no_code_and_says_nothing(tmp_path: Path, is_installed: bool) -> None:
    if is_installed:
        (tmp_path / "kernels.py").write_text("def get_kernel(*args, **options):\n    print('fetched', args)\n")
    program = (
        "import importlib.util, sys, qlora_lightning.model\n"
        "assert 'bitsandbytes' in sys.modules and 'kernels' not in sys.modules\n"
        f"assert (importlib.util.find_spec('kernels') is not None) >= {is_installed}"  # for whoever wants it
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's threads are Linux's")
@pytest.mark.parametrize(
    ("code", "own", "expected"),
    [
        ("from qlora_lightning.cli import main; main(['fit', '--help'])", {}, "10000"),
        ("from qlora_lightning import QLoRAModule", {}, "10000"),
        ("from qlora_lightning import QLoRAModule", {"GOMP_SPINCOUNT": "77"}, "77"),
        ("from qlora_lightning import QLoRAModule", {"OMP_WAIT_POLICY": "passive"}, "0"),
    ],
)
def test_threads_wait_briefly_unless_the_user_says_otherwise(code, own, expected):
    usual = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    idle = "import qlora_lightning.support.imports as h; h._is_machine_busy = lambda: False; "  # other tests run beside
    shown = subprocess.run(
        [
            sys.executable,
            "-c",
            idle + code + "; import os; assert os.environ.get('GOMP_SPINCOUNT') == os.getenv('OWN')",
        ],
        env=usual | own | {"OMP_DISPLAY_ENV": "verbose"} | ({"OWN": "77"} if "GOMP_SPINCOUNT" in own else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{expected}'" in shown.stderr


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="takes Linux")
def test_a_machine_is_busy_where_others_compute_on_every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    for others, busy in (((cores,) * 3, True), ((cores, cores - 1, cores), False)):
        reads = iter(f"0.10 0.20 0.30 {1 + running}/99 1234\n" for running in others)
        monkeypatch.setattr(Path, "read_text", lambda self, reads=reads: next(reads))
        assert _is_machine_busy() == busy
