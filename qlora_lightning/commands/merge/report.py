"""The check of a merge as a table and as JSON, and whether it passes."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_lightning.model.weights.layerwise import Comparison

MIN_TOP1 = 0.995  # of a merge in fp32: what is computed twice in another order may turn over a tie
MAX_KL = {"exact": 1e-3, "rounded": 1e-2, "original": 0.5}


@dataclass(frozen=True)
class Verdict:
    """One model against base and adapter.

    Attributes:
        name: What it is, in words.
        comparison: How far it lies.
        max_kl: The divergence above which the merge is refused; ``None``: it is only told.
        min_top1: The agreement below which it is refused.
    """

    name: str
    comparison: Comparison
    max_kl: float | None = None
    min_top1: float = 0.0

    @property
    def fault(self) -> str | None:
        """What is wrong with it, in words."""
        found = self.comparison
        if self.max_kl is not None and not found.kl <= self.max_kl:  # NaN is a fault
            return f"{self.name}: KL {found.kl:.2g} nats per token, more than {self.max_kl:g}"
        if found.top1 < self.min_top1:
            return (
                f"{self.name}: the same first token at {found.top1:.1%} of the tokens, fewer than {self.min_top1:.1%}"
            )
        return None


@dataclass
class Report:
    """All that a merge found.

    Attributes:
        facts: What was merged, as plain values.
        rows: Validation rows that it was checked on.
        labelled_tokens: Tokens in them that were compared.
        reference_loss: Of base and adapter.
        verdicts: Of everything that was compared with them.
    """

    facts: dict[str, Any]
    rows: int = 0
    labelled_tokens: int = 0
    reference_loss: float | None = None
    verdicts: list[Verdict] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Give it as plain values."""
        models = {verdict.name: dataclasses.asdict(verdict.comparison) for verdict in self.verdicts}
        check = {
            "rows": self.rows,
            "labelled_tokens": self.labelled_tokens,
            "base + adapter": {"loss": self.reference_loss},
            **models,
        }
        return {**self.facts, "check": check if self.rows else None}

    def print(self, console: Console) -> None:
        """Print the table."""
        if not self.rows:
            return
        title = (
            f"Against base + adapter, in fp32: {self.rows} validation rows, {self.labelled_tokens:,} labelled tokens"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("", no_wrap=True)
        for heading in ("loss", "KL", "same top token", "logits differ by"):
            table.add_column(heading, justify="right")
        table.add_row("base + adapter", f"{self.reference_loss:.4f}", *3 * ("",))
        for verdict in self.verdicts:
            found = verdict.comparison
            table.add_row(
                verdict.name,
                f"{found.loss:.4f}",
                f"{found.kl:.1e}",
                f"{found.top1:.2%}",
                f"{found.mean_difference:.1e}",
                style="red" if verdict.fault else None,
            )
        console.print(table)
