"""The figures of one run, and the line of JSON in which a child process hands them to its parent."""

import json
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Figures:
    """What one run of one side measured.

    Attributes:
        tokens: real tokens of the epoch; padding is not counted.
        seconds: of the training loop, without imports, loading and tokenizing.
        peak_rss_gib: of the whole process, imports and loading included.
        losses: of each optimizer step, nats per labelled token.
        versions: of the packages that did the work.
    """

    tokens: int
    seconds: float
    peak_rss_gib: float
    losses: list[float]
    versions: dict[str, str]

    @property
    def tokens_per_second(self) -> float:
        """Tokens over seconds."""
        return self.tokens / self.seconds


def print_figures(tokens: int, seconds: float, losses: Sequence[float], packages: Sequence[str]) -> None:
    """Print the figures of this process as the last thing that it says."""
    versions = {package: version(package) for package in packages}
    print(json.dumps(asdict(Figures(tokens, seconds, _peak_rss_gib(), list(losses), versions))), flush=True)


def read_figures(output: str) -> Figures:
    """Read what :func:`print_figures` printed, below whatever else the process had to say."""
    return Figures(**json.loads(output.strip().splitlines()[-1]))


def _peak_rss_gib() -> float:
    """Return the peak of this process's own memory.

    ``getrusage`` carries over from the parent what it held when it started us; Linux's VmHWM begins anew.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return (peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20
