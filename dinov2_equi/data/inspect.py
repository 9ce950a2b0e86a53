"""What is in a data set: counts, sizes, bad images, how fast it loads, and a sheet of crops to look at.

    python -m dinov2_equi.data.inspect /data/photos
    python -m dinov2_equi.data.inspect "mix:3*/data/photos + 1*/data/shards/*.tar" --images 5000 --sheet crops.png
    python -m dinov2_equi.data.inspect /data/satellite --in-channels 5 --value-range 0 10000

From a clone without installation, in any folder: python dinov2_equi/run/inspect_data.py with the same arguments.

The data set is named as in `train.dataset_path`. Up to `--images` of its images, evenly spread, are read; speed is that
of one loader process with DINOv2's crops of 224 and 96 pixels. Exit code 2: the data set cannot be opened.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinov2_equi.data.augmentations import DataAugmentationDINO
from dinov2_equi.data.bad_images import check_shape
from dinov2_equi.data.contact_sheet import contact_sheet
from dinov2_equi.data.datasets.base import DatasetError, ImageDataset, UnreadableImageError
from dinov2_equi.data.datasets.channels import RGB_CHANNELS, ChannelFormat
from dinov2_equi.data.datasets.folder import ImageFolder
from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.loaders import MultiCropDataset, SourceDataset

SHOWN_BAD = 20
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
    parser.add_argument("--sheet", type=Path, default=Path("contact_sheet.png"), help="default: contact_sheet.png")
    parser.add_argument("--rows", type=int, default=6, help="images on the sheet (default: 6)")
    parser.add_argument("--seed", type=int, default=0, help="of the crops on the sheet")
    parser.add_argument("--in-channels", type=int, default=RGB_CHANNELS, help="data.in_channels (default: 3)")
    parser.add_argument(
        "--value-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="data.value_range: what becomes 0 and 1"
    )
    return parser.parse_args(argv)


def examine(dataset: ImageDataset, max_images: int) -> Findings:
    """Read images, evenly spread, at full resolution, and note sizes and faults."""
    findings = Findings()
    count = min(max_images, len(dataset)) if max_images else len(dataset)
    for number in range(count):
        index = number * len(dataset) // count
        try:
            image = dataset.load_tensor(index)
            check_shape(image, dataset.name(index))
        except UnreadableImageError as error:
            findings.bad.append((error.path or dataset.name(index), error.reason))
            continue
        findings.sizes.append((image.shape[2], image.shape[1]))
        findings.num_grey += torch.equal(image, image[:1].expand_as(image))
    return findings


def describe(dataset: ImageDataset, findings: Findings) -> list[str]:
    """Return what was found, as lines of text."""
    size = f", {dataset.num_bytes.sum(dtype=np.int64) / 1e9:.3g} GB" if isinstance(dataset, ImageFolder) else ""
    lines = [f"{len(dataset)} images{size}"]
    if dataset.targets is not None:
        counts = np.bincount(dataset.targets, minlength=len(dataset.classes))
        lines.append(
            f"{len(dataset.classes)} classes of {counts.min()} to {counts.max()} images, median {np.median(counts):g}"
        )
    else:
        lines.append("no classes")
    lines.append(f"{findings.num_read} of them read: {len(findings.bad)} bad, {findings.num_grey} grey")
    if findings.sizes:
        widths, heights = zip(*findings.sizes, strict=True)
        short = [min(size) for size in findings.sizes]
        lines.append(
            f"width {min(widths)} to {max(widths)}, height {min(heights)} to {max(heights)}, median shorter side "
            f"{statistics.median(short):g} pixels"
        )
    lines += [f"bad: {path}: {reason}" for path, reason in findings.bad[:SHOWN_BAD]]
    if len(findings.bad) > SHOWN_BAD:
        lines.append(f"... and {len(findings.bad) - SHOWN_BAD} more bad ones")
    return lines


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


def _channels(args: argparse.Namespace) -> ChannelFormat | None:
    if args.in_channels == RGB_CHANNELS and not args.value_range:
        return None
    return ChannelFormat(args.in_channels, tuple(args.value_range) if args.value_range else None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a fault of the input ends in one line on stderr and exit code 2."""
    args = parse_arguments(argv)
    try:
        if args.sheet.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise DatasetError(f"--sheet must end in .png, .jpg or .webp; got {args.sheet}")
        if args.images < 0 or args.rows < 1:
            raise DatasetError(f"--images must be >= 0 and --rows >= 1; got {args.images} and {args.rows}")
        channels = _channels(args)
        dataset = make_dataset(args.data, channels)
        print("\n".join(describe(dataset, examine(dataset, args.images))))
        augmentation = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 8, 224, 96, is_rgb=channels is None)
        crops = MultiCropDataset(dataset, augmentation, args.seed)
        speeds = [images_per_second(images) for images in (crops, SourceDataset(dataset, augmentation, args.seed))]
        print(
            f"about {speeds[0]:.0f} images/s for each loader process with data.augment_on=cpu, {speeds[1]:.0f} with "
            "device (2 crops of 224 pixels, 8 of 96)"
        )
        write_sheet(args.sheet, crops, args.rows)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(f"crops to look at: {args.sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
