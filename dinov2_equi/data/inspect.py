"""What is in a data set: counts, sizes, bad images, how fast it loads, and a sheet of crops to look at.

    python -m dinov2_equi.data.inspect /data/photos
    python -m dinov2_equi.data.inspect "mix:3*/data/photos + 1*/data/shards/*.tar" --images 5000 --sheet crops.png
    python -m dinov2_equi.data.inspect /data/satellite --in-channels 5 --value-range 0 10000

From a clone without installation, in any folder: python dinov2_equi/run/inspect_data.py with the same arguments.

The data set is named as in `train.dataset_path`. Up to `--images` of its images, evenly spread, are read, and of files
up to `--headers` headers, for their sizes; once all were read they are kept. Speed is that of one loader process with
DINOv2's crops of 224 and 96 pixels. Exit code 2: the data set cannot be opened.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinov2_equi.data.augmentations import DataAugmentationDINO
from dinov2_equi.data.bad_images import GREATEST_ASPECT, LEAST_SIDE_PX, check_shape
from dinov2_equi.data.contact_sheet import contact_sheet
from dinov2_equi.data.datasets.base import DatasetError, ImageDataset, UnreadableImageError, path_of, spread_indices
from dinov2_equi.data.datasets.channels import RGB_CHANNELS, channel_format
from dinov2_equi.data.datasets.listed import ListedImages
from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.datasets.pixel_sizes import Sizes, pixel_sizes
from dinov2_equi.data.loaders import MultiCropDataset, SourceDataset
from dinov2_equi.logging.progress import tracked

SHOWN_BAD, SHOWN_CLASSES = 20, 8
GLOBAL_CROP_PX, LOCAL_CROP_PX = 224, 96
SPEED_SECONDS, SPEED_IMAGES = 8, 64


@dataclass
class Findings:
    """What was found among the images that were read."""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(width, height) of each good image, pixels."""
    num_grey: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of each bad one."""

    @property
    def num_read(self) -> int:
        """Number of images that were read, good or bad."""
        return len(self.sizes) + len(self.bad)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATASET", help="a folder, list, table, pattern, shards or form of a data set")
    parser.add_argument("--images", type=int, default=500, help="images to read at most; 0: all (default: 500)")
    parser.add_argument(
        "--headers",
        type=int,
        default=10_000,
        help="headers of files to read at most; 0: all (default: 10000)",
    )
    parser.add_argument("--sheet", type=Path, default=Path("contact_sheet.png"), help="default: contact_sheet.png")
    parser.add_argument("--rows", type=int, default=6, help="images on the sheet (default: 6)")
    parser.add_argument("--seed", type=int, default=0, help="of the crops on the sheet")
    parser.add_argument("--in-channels", type=int, default=RGB_CHANNELS, help="data.in_channels (default: 3)")
    parser.add_argument(
        "--value-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="data.value_range: what becomes 0 and 1"
    )
    return parser.parse_args(argv)


def examine(dataset: ImageDataset, indices: Sequence[int]) -> Findings:
    """Read images at full resolution, and note sizes and faults; a progress bar is shown."""
    findings = Findings()
    for index in tracked(indices, f"Reading {len(indices):,} images"):
        try:
            image = dataset.load_tensor(index)
            check_shape(image, path_of(dataset, index))
        except UnreadableImageError as error:
            findings.bad.append((error.path or path_of(dataset, index), error.reason))
            continue
        findings.sizes.append((image.shape[2], image.shape[1]))
        findings.num_grey += torch.equal(image, image[:1].expand_as(image))
    return findings


def suspected(sizes: Sizes) -> np.ndarray:
    """Return which headers cannot be read, or tell of a shape that is none to be trained on: bool [n], of [n, 2]."""
    short, long = sizes.min(axis=1).astype(np.int64), sizes.max(axis=1).astype(np.int64)
    is_suspect: np.ndarray = (short < LEAST_SIDE_PX) | (long > GREATEST_ASPECT * short)
    return is_suspect


def report(dataset: ImageDataset, max_images: int, max_headers: int) -> list[str]:
    """Return what is in a data set, as lines of text; images with suspicious headers are read before others."""
    lines = describe(dataset)
    count = min(max_images or len(dataset), len(dataset))
    if not isinstance(dataset, ListedImages):
        findings = examine(dataset, spread_indices(len(dataset), count))
        return (
            lines
            + describe_findings(findings)
            + describe_sizes(np.array(findings.sizes, np.uint32), "pixels of the good ones")
        )
    indices, sizes = pixel_sizes(dataset, max_headers or None)
    is_suspect = suspected(sizes)
    num_suspects = int(is_suspect.sum())
    if num_suspects:
        lines.append(
            f"{num_suspects:,} of {len(indices):,} headers promise no image to train on; {SHOWN_BAD} at most are read"
        )
    # More of them are not named anyway.
    first = [indices[row] for row in np.flatnonzero(is_suspect)[: min(SHOWN_BAD, count)].tolist()]
    others = sorted(set(spread_indices(len(dataset), count)) - set(first))
    kept = [others[place] for place in spread_indices(len(others), count - len(first))]
    findings = examine(dataset, sorted(first + kept))
    good = np.asarray(sizes[~is_suspect])
    return lines + describe_findings(findings) + describe_sizes(good, f"pixels, by {len(good):,} headers")


def describe(dataset: ImageDataset) -> list[str]:
    """Return how much there is, as lines of text."""
    num_bytes = getattr(dataset, "num_bytes", None)
    size = "" if num_bytes is None else f", {_bytes(int(num_bytes.sum(dtype=np.int64)))}"
    lines = [f"{len(dataset):,} images{size}"]
    if dataset.targets is None:
        return [*lines, "no classes"]
    counts = np.bincount(dataset.targets, minlength=len(dataset.classes))
    median = "" if counts.min() == counts.max() else f", median {np.median(counts):g}"
    names = ", ".join(dataset.classes[:SHOWN_CLASSES]) + (", ..." if len(counts) > SHOWN_CLASSES else "")
    return [*lines, f"{len(counts):,} classes of {_span(counts)} images{median}: {names}"]


def describe_findings(findings: Findings) -> list[str]:
    """Return what was found among the images that were read, as lines of text."""
    lines = [f"{findings.num_read:,} of them read: {len(findings.bad):,} bad, {findings.num_grey:,} grey"]
    lines += [f"bad: {path}: {reason}" for path, reason in findings.bad[:SHOWN_BAD]]
    if len(findings.bad) > SHOWN_BAD:
        lines.append(f"... and {len(findings.bad) - SHOWN_BAD:,} more bad ones")
    return lines


def describe_sizes(sizes: Sizes, start: str) -> list[str]:
    """Return the range of sizes [n, 2], width and height, as lines of text; none where there are none."""
    if not len(sizes):
        return []
    short = sizes.min(axis=1)
    small = int((short < GLOBAL_CROP_PX).sum())
    return [
        f"{start}: width {_span(sizes[:, 0])}, height {_span(sizes[:, 1])}, shorter side {_span(short)}, "
        f"median {np.median(short):g}; {small:,} with a shorter side below the {GLOBAL_CROP_PX} of a global crop"
    ]


def _span(values: np.ndarray) -> str:
    """Return the least and the greatest value, or the one that all have."""
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _bytes(count: int) -> str:
    """Return a number of bytes in a unit that leaves few digits."""
    unit, name = next(((size, name) for size, name in ((1e9, "GB"), (1e6, "MB")) if count >= size), (1e3, "kB"))
    return f"{count / unit:,.3g} {name}"


def images_per_second(images: MultiCropDataset | SourceDataset) -> float:
    """Return how many images one process makes ready in a second."""
    torch.set_num_threads(1)
    images[0]  # opens and allocates what is needed once
    started = time.perf_counter()
    done = 0
    while done < SPEED_IMAGES and time.perf_counter() - started < SPEED_SECONDS:
        images[1 + done]
        done += 1
    return done / (time.perf_counter() - started)


def write_sheet(path: Path, images: MultiCropDataset, num_rows: int) -> None:
    """Write the first images of a training, each beside its crops, as a picture."""
    sources = [images.load(position)[0] for position in range(num_rows)]
    crops = [images[position].crops for position in range(num_rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(contact_sheet(sources, crops).numpy()).save(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a fault of the input ends in one line on stderr and exit code 2."""
    args = parse_arguments(argv)
    try:
        if args.sheet.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise DatasetError(f"--sheet must end in .png, .jpg or .webp; got {args.sheet}")
        if min(args.images, args.headers) < 0 or args.rows < 1:
            raise DatasetError(
                f"--images and --headers must be >= 0 and --rows >= 1; got {args.images}, {args.headers} and "
                f"{args.rows}"
            )
        channels = channel_format(args.in_channels, args.value_range)
        dataset = make_dataset(args.data, channels)
        print("\n".join(report(dataset, args.images, args.headers)))
        augmentation = DataAugmentationDINO(
            (0.32, 1.0), (0.05, 0.32), 8, GLOBAL_CROP_PX, LOCAL_CROP_PX, is_rgb=channels is None
        )
        crops = MultiCropDataset(dataset, augmentation, args.seed)
        speeds = [images_per_second(images) for images in (crops, SourceDataset(dataset, augmentation, args.seed))]
        print(
            f"about {speeds[0]:.0f} images/s for each loader process with data.augment_on=cpu, {speeds[1]:.0f} with "
            f"device (2 crops of {GLOBAL_CROP_PX} pixels, 8 of {LOCAL_CROP_PX})"
        )
        write_sheet(args.sheet, crops, args.rows)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(f"crops to look at, in a row an image, its 2 global and its 8 local crops: {args.sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
