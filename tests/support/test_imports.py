"""What imports cost and change: no compiler, no fetched code, brief waits; nothing stays behind."""

import os
import subprocess
import sys

import pytest

_SHOW = """
import gc, importlib.util, os, sys
import qlora_lightning.support.imports as imports
imports._is_machine_busy = lambda: False  # other tests run beside
CODE
assert os.environ.get("GOMP_SPINCOUNT") == os.environ.get("OWN")
assert "TORCHDYNAMO_DISABLE" not in os.environ and gc.isenabled()
assert "torch._inductor.compile_fx" not in sys.modules
assert "bitsandbytes" in sys.modules
assert importlib.util.find_spec("kernels") is not None  # for whoever wants it
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's threads are Linux's")
@pytest.mark.parametrize(
    ("code", "own", "expected"),
    [
        ("from qlora_lightning.cli import main; main(['fit', '--print_config'])", {}, "10000"),
        *(
            pytest.param(
                f"from qlora_lightning.cli import main; main({arguments})", {}, "10000", marks=pytest.mark.slow
            )
            for arguments in (["plan"], ["evaluate", "--config=configs/quickstart.yaml"])
        ),
        ("from qlora_lightning import QLoRAModule", {"GOMP_SPINCOUNT": "77", "OWN": "77"}, "77"),
        ("import qlora_lightning.model", {"OMP_WAIT_POLICY": "passive"}, "0"),
    ],
)
def test_no_way_in_imports_the_compiler_or_fetches_code_and_threads_wait_briefly(tmp_path, code, own, expected):
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **options):\n    print('fetched', args)\n")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    shown = subprocess.run(
        [sys.executable, "-c", _SHOW.replace("CODE", code)],
        env=environment | own | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert "fetched" not in shown.stdout
    assert f"GOMP_SPINCOUNT = '{expected}'" in shown.stderr
