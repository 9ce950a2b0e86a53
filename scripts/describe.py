"""Print what a training step of a configuration costs, part by part, and the share of the equivariance branch.

    python scripts/describe.py configs/vitl14_equi.yaml [FILE ...] [key=value ...]

Parameters, and floating-point operations (forward and backward, a product and a sum counted as two) for one image with
all its crops. Nothing is allocated or computed, so the largest model takes seconds. See `train/describe.py` for what is
counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.table import Table  # noqa: E402 (after the path guard)

from dinov2_equi.config.load import ConfigError  # noqa: E402
from dinov2_equi.config.schema import Config  # noqa: E402
from dinov2_equi.logging.console import get_console  # noqa: E402
from dinov2_equi.train.describe import StepCost, describe_step  # noqa: E402
from dinov2_equi.train.settings import load_run_config, split_words  # noqa: E402

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(number: float) -> str:
    """Return a number with three or more digits and the letter of its thousands: 1234567 as `1.23 M`."""
    for size, letter in UNITS:
        if number >= size:
            return f"{number / size:.{0 if number >= 100 * size else 1 if number >= 10 * size else 2}f} {letter}"
    return f"{number:.0f}"


def make_table(cost: StepCost, title: str) -> Table:
    """Return the cost of a step as a table."""
    table = Table(title=title, title_justify="left")
    for column in ("part", "network"):
        table.add_column(column)
    for column in ("parameters", "FLOP/image", "of the step"):
        table.add_column(column, justify="right")
    for part in cost.parts:
        name = f"{part.name} *" if part.in_branch else part.name
        table.add_row(
            name,
            part.network,
            short(part.parameters) if part.parameters else "-",
            short(part.flops),
            f"{part.flops / cost.flops:.2%}",
        )
    table.add_section()
    trained = sum(part.parameters for part in cost.parts if part.network == "student")
    table.add_row("together", "", f"{short(trained)} trained", short(cost.flops), "")
    return table


def summary(cost: StepCost) -> str:
    """Return the share of the branch in words."""
    if not any(part.in_branch for part in cost.parts):
        return "No equivariance branch: equi.family is null."
    return (
        f"* The branch: {short(cost.branch_flops)}FLOP, {cost.branch_share:.2%} of the same step without it "
        f"({short(cost.flops_without_branch)}FLOP). The whole step changes by {cost.step_increase:+.2%}: the width of "
        "the heads' input changes too."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Describe one configuration; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="FILE|key=value", help="YAML files in their order, and overrides")
    files, overrides = split_words(parser.parse_args(argv).words)
    try:
        cfg: Config = load_run_config(files, overrides)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    crops = cfg.crops
    locals_ = f"{crops.local_crops_number} of {crops.local_crops_size}"
    title = f"{cfg.student.arch}/{cfg.student.patch_size}, crops: 2 of {crops.global_crops_size}, {locals_} pixels"
    cost = describe_step(cfg)
    console = get_console()
    console.print(make_table(cost, title))
    console.print(summary(cost), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
