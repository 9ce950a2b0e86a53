"""Mean and standard deviation of each channel of a data set, as lines for a configuration.

    python scripts/dataset_stats.py /data/photos
    python scripts/dataset_stats.py /data/satellite --in-channels 5 --value-range 0 10000 --num-workers 8

The data set is named as in `train.dataset_path`, and read as a training with these settings reads it. Every pixel
counts the same; sums are in float64. Exit code 2: the data set cannot be opened, or no image of it be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console  # noqa: E402 (after the path guard)
from rich.progress import track  # noqa: E402

from dinov2_equi.data.channel_statistics import ChannelStatistics, channel_statistics  # noqa: E402
from dinov2_equi.data.datasets.base import DatasetError, spread_indices  # noqa: E402
from dinov2_equi.data.datasets.channels import RGB_CHANNELS, channel_format  # noqa: E402
from dinov2_equi.data.datasets.make import make_dataset  # noqa: E402
from dinov2_equi.run.command import EXIT_DONE, command_parser, run_command  # noqa: E402

SHOWN_BAD = 5


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(__doc__)
    parser.add_argument("data", metavar="DATASET", help="a folder, list, table, pattern, shards or form of a data set")
    parser.add_argument(
        "--in-channels", type=int, default=RGB_CHANNELS, help="data.in_channels (default: 3, photographs)"
    )
    parser.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="data.value_range: values that become 0 and 1 (default: by the type of the image)",
    )
    parser.add_argument("--images", type=int, default=0, help="images to read, evenly spread; 0: all (default)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read (default: 0, this one)")
    return parser.parse_args(argv)


def configuration_lines(found: ChannelStatistics, args: argparse.Namespace) -> list[str]:
    """Return the section `data` of a configuration."""
    lines = ["data:", f"  in_channels: {args.in_channels}"]
    if args.value_range:
        lines.append(f"  value_range: [{args.value_range[0]:g}, {args.value_range[1]:g}]")
    for name, values in (("mean", found.mean), ("std", found.std)):
        lines.append(f"  {name}: [{', '.join(f'{value:.6g}' for value in values)}]")
    return lines


def command(args: argparse.Namespace) -> int:
    """Read the images and print what was found."""
    if args.images < 0:
        raise DatasetError(f"--images must be >= 0; got {args.images}")
    dataset = make_dataset(args.data, channel_format(args.in_channels, args.value_range))
    count = min(args.images or len(dataset), len(dataset))
    indices = spread_indices(len(dataset), count)
    found = None
    steps = channel_statistics(dataset, indices, num_workers=args.num_workers)
    shown = track(steps, f"Reading {count} images", total=count, console=Console(stderr=True), transient=True)
    for so_far in shown:
        found = so_far
    assert found is not None
    for message in found.bad[:SHOWN_BAD]:
        sys.stderr.write(f"passed over: {message}\n")
    if found.num_images == 0:
        raise DatasetError(f"none of {count} images can be read; the last: {found.bad[-1]}")
    facts = f"{found.num_images} images, {found.num_pixels} pixels, {len(found.bad)} images that cannot be read"
    sys.stdout.write("\n".join([f"# {facts}", *configuration_lines(found, args), ""]))
    return EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(command, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
