"""Importing changes nothing and says nothing; bitsandbytes brings neither fetched code nor torch's compiler."""

import os
import subprocess
import sys

import pytest

_SHOW = """
import gc, importlib.util, os, sys
CODE
assert gc.isenabled()
assert "torch._inductor.compile_fx" not in sys.modules
assert "bitsandbytes" in sys.modules
assert importlib.util.find_spec("kernels") is not None  # for whoever wants it
if "qlora_lightning.cli" not in sys.modules:
    from lightning.pytorch.strategies import StrategyRegistry
    assert not {"GOMP_SPINCOUNT", "TORCHDYNAMO_DISABLE"} & os.environ.keys()
    assert "ddp_sharded" not in StrategyRegistry.available_strategies()
"""


@pytest.mark.parametrize(
    ("code", "spins"),
    [
        ("from qlora_lightning.cli import main; main(['fit', '--print_config'])", "10000"),
        pytest.param("from qlora_lightning import ShardedDDPStrategy, QLoRAModule", None, marks=pytest.mark.slow),
    ],
)
def test_no_way_in_imports_the_compiler_or_fetches_code_and_only_the_command_sets_anything(tmp_path, code, spins):
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **options):\n    print('fetched', args)\n")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    shown = subprocess.run(
        [sys.executable, "-c", _SHOW.replace("CODE", code)],
        env=environment | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert "fetched" not in shown.stdout
    if spins is None:
        assert shown.stdout == ""
    elif sys.platform.startswith("linux"):  # GNU's threads
        assert f"GOMP_SPINCOUNT = '{spins}'" in shown.stderr
