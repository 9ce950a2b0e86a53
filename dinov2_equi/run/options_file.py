"""Options of a command from a YAML file: those of the command line decide over them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinov2_equi.evaluation.dense.settings import read_mapping
from dinov2_equi.run.command import EXIT_CODES
from dinov2_equi.run.launch import ARGUMENTS


class OptionsFileParser(argparse.ArgumentParser):
    """A parser with `--config FILE`, whose lines `test_pairs: 500` are read as `--test-pairs 500` before the others.

    What is wrong in a file ends as on the command line: one message, exit code 2.
    """

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description,
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # the file is looked for by its whole name
        )
        config = "YAML with options, `steps: 5000`; the command line decides. Some lie in configs/ beside the script"
        self.add_argument("--config", type=Path, metavar="FILE", help=config)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the words of the file, then those of the command line."""
        words = list(sys.argv[1:] if args is None else args)
        own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        own.add_argument("--config", type=Path)
        path = own.parse_known_args(words)[0].config
        try:
            words = [*(words_of_file(path) if path is not None else []), *words]
        except (ValueError, OSError) as error:
            self.error(str(error))
        return super().parse_known_args(words, namespace)


def words_of_file(path: Path) -> Sequence[str]:
    """Return the options in a YAML file as words of a command line.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    words = []
    for name, value in read_mapping(path).items():
        if str(name).replace("-", "_") in ARGUMENTS:
            raise ValueError(f"{name} in {path} says how a job starts: give it on the command line")
        if name in ("config", "help"):
            raise ValueError(f"{name} in {path} is no option for a file")
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in values):
            raise ValueError(f"expected {name} in {path} to be a number, a text or a list of them, got {value!r}")
        words += [f"--{str(name).replace('_', '-')}", *(str(item) for item in values)]
    return words
