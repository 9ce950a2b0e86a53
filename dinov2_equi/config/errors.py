"""The error of a configuration that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration."""

    key: str
    """Full dotted key, such as `optim.epochs`; empty when a file cannot be read at all."""

    text: str
    """What was expected, what arrived, what to do: a sentence that names the key."""


class ConfigError(ValueError):
    """A configuration that cannot be used; its message lists every problem that was found.

    Attributes:
        keys: The dotted keys at fault, in the order of the message.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.keys = tuple(problem.key for problem in problems)
        lines = [problem.text for problem in problems]
        if len(lines) == 1:
            super().__init__(lines[0])
        else:
            super().__init__("\n  - ".join([f"{len(lines)} problems in the configuration:", *lines]))
