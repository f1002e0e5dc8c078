"""llama.cpp's own quantizer, for the types whose numbers only it chooses well."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError

K_QUANTS = ("q4_k_m", "q5_k_m", "q6_k")
# in a process of its own, as the program would be: where it cannot go on, it ends the process
_BY_PACKAGE = """
import sys, llama_cpp
source, target, kind = sys.argv[1:]
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), options))
"""


def find_quantizer(kind: str) -> list[str]:
    """Return the command that takes a GGUF file, another to write, and a type; raise UserError if there is none."""
    program = shutil.which("llama-quantize")
    if program is not None:
        return [program]
    if importlib.util.find_spec("llama_cpp") is not None:
        return [sys.executable, "-c", _BY_PACKAGE]
    raise UserError(
        f"--gguf {kind} needs llama.cpp's quantizer, and neither the program llama-quantize nor the Python package "
        "llama-cpp-python is there: `pip install llama-cpp-python`, `brew install llama.cpp`, or `apt install "
        "llama.cpp` where the distribution has it."
    )


def quantize(file: Path, kind: str) -> Path:
    """Quantize a GGUF file of 16 bits, and return the file that takes its place."""
    command, target = find_quantizer(kind), file.with_name(f"model-{kind}.gguf")
    done = subprocess.run([*command, file, target, kind.upper()], capture_output=True, text=True, errors="replace")
    name = command[0] if len(command) == 1 else "llama-cpp-python"
    if done.returncode or not target.is_file():
        last = (done.stderr or done.stdout).strip().rpartition("\n")[2]
        raise UserError(f"--gguf {kind}: {name} failed with code {done.returncode}: {last}")
    say(f"Quantized to {kind} by {name}")
    file.unlink()
    return target
