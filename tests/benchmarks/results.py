"""What has been measured so far: kept in a file from the first run on, so that a kill loses little."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_lightning.commands.json_output import write_json
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.measure import Measured
from tests.benchmarks.report import rows_as_json
from tests.benchmarks.table import (
    Row,
    compare_ceilings,
    compare_sides,
    compare_starts,
    rows_of_8b,
    rows_of_busy_machine,
    rows_of_selective,
)


@dataclass
class Results:
    """All figures.

    Attributes:
        setup: what was asked for.
        file: where to keep them as JSON, if anywhere.
        measured: the runs of the sides.
        sizes: what ``measure_scaling`` found.
        llama_8b: what ``llama_8b`` printed.
    """

    setup: dict[str, Any]
    file: Path | None = None
    measured: Measured = field(default_factory=Measured)
    sizes: list[dict[str, Any]] = field(default_factory=list)
    llama_8b: dict[str, Any] | None = None

    def rows(self) -> list[Row]:
        """Make the rows of all that is measured: of the sides once each has run in every setting."""
        plain, checkpointing, selective = self.measured.plain, self.measured.checkpointing, self.measured.selective
        accelerator = self.setup["accelerator"]
        sides = (
            [
                *compare_sides(plain, checkpointing, accelerator),
                *rows_of_busy_machine(plain, self.measured.busy),
                *rows_of_selective(selective, accelerator),
                *compare_ceilings(plain, checkpointing),
                *compare_starts(plain),
            ]
            if selective
            else []
        )
        rows = sides + ([] if self.llama_8b is None else rows_of_8b(self.llama_8b["step"], self.llama_8b["layers"]))
        return [replace(row, goal=None) for row in rows] if accelerator == "gpu" else rows  # goals are a CPU's

    def machine(self) -> dict[str, Any]:
        """Name what the figures were measured on; nothing before the first run."""
        ours, peers = (self.measured.plain.get(side, []) for side in ("ours", "peer"))
        versions = [runs[0].versions if runs else {} for runs in (ours, peers)]
        return describe_machine(*versions, self.setup["accelerator"])

    def keep(self, complete: bool = False) -> None:
        """Write the file anew."""
        if self.file is None:
            return
        summary = {"setup": self.setup, "complete": complete, "rows": rows_as_json(self.rows())}
        summary |= {"machine": self.machine(), "runs": asdict(self.measured)}
        write_json(self.file, summary | {"scaling": self.sizes, "llama_8b": self.llama_8b})
