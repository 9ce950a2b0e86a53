"""What a campaign of injected faults found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dinov2_equi.fsdp.checkpoint import sha256_of_tensors


@dataclass
class Outcome:
    """Counts of one campaign.

    Attributes:
        promise: what has to hold after every fault, for the table.
        cases: faults that were injected and judged.
        failures: one line for each case in which the promise was broken.
        details: further numbers.
    """

    promise: str
    cases: int = 0
    failures: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def judge(self, case: str, problem: str | None) -> None:
        """Count a case; `problem` says how the promise was broken, None that it was kept."""
        self.cases += 1
        if problem is not None:
            self.failures.append(f"{case}: {problem}")

    def count(self, detail: str) -> None:
        """Add one to a number of the details."""
        self.details[detail] = self.details.get(detail, 0) + 1


def fingerprint(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one SHA-256 over all sets of tensors of a checkpoint: for a training model, optimizer and rng."""
    return sha256_of_tensors(
        {f"{name}/{key}": value for name, values in tensors.items() for key, value in values.items()}
    )
