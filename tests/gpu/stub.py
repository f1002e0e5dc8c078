"""Builds the stub of a card, card.c, for the torch of this Python."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

# Functions of libcuda and NVML that are looked up by their names, beside those that are linked.
_NAMES = re.compile(rb"\b(?:cu|nvml)[A-Z][a-z]\w+\b")
_FUNCTIONS = re.compile(r"(__)?cu(da|blas)?[A-Z]|nvml")
_LAUNCHES = re.compile(r"[Gg]em[mv]|LtMatmul$|LaunchKernel(Ex|ExC)?$")


def build_stub(folder: Path) -> dict[str, str]:
    """Compile the stub into a folder; return the environment of a process that takes it for a card.

    ``STUB_MIB`` and ``STUB_CC`` are the card's memory and its compute capability: 75, 80, 86, 89, 90 or 100.
    """
    torch_lib, nvidia = Path(torch.__file__).parent / "lib", Path(triton.__file__).parent / "backends/nvidia"
    linked = [torch_lib / f"lib{name}.so" for name in ("torch_cuda", "c10_cuda", "torch_cuda_linalg")]
    linked += Path(torch.__file__).parents[1].glob("bitsandbytes/libbitsandbytes_cuda*.so")
    cc = ["cc", "-O2", "-fPIC", "-w", f"-I{nvidia / 'include'}"]
    subprocess.run([*cc, "-c", Path(__file__).with_name("card.c"), "-o", folder / "card.o"], check=True)

    asked = {"cuLaunchKernel"}.union(*(_symbols("-D", "--undefined-only", library) for library in linked))
    for file in (torch_lib / "libc10_cuda.so", nvidia / "driver.c"):
        asked |= {name.decode() for name in _NAMES.findall(file.read_bytes())}
    rest = {name for name in asked if _FUNCTIONS.match(name)} - {*_symbols("--defined-only", folder / "card.o")}
    lines = [f"long {name}(void) {{ {'card_launch(); ' * bool(_LAUNCHES.search(name))}return 0; }}" for name in rest]
    (folder / "rest.c").write_text("\n".join(["void card_launch(void);", *sorted(lines)]))

    library = folder / "libcuda.so.1"
    sources = [folder / "card.o", folder / "rest.c"]
    subprocess.run([*cc, "-shared", f"-Wl,-soname,{library.name}", *sources, "-o", library], check=True)
    for name in ("libcuda.so", "libnvidia-ml.so.1"):
        (folder / name).symlink_to(library)
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    paths = {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(folder), "TRITON_LIBCUDA_PATH": str(folder)}
    return {**paths, **caches, "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def _symbols(*arguments: object) -> Iterator[str]:
    printed = subprocess.run(["nm", *map(str, arguments)], check=True, capture_output=True, text=True).stdout
    for line in printed.splitlines():
        yield line.split()[-1].partition("@")[0]
