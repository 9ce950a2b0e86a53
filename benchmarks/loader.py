"""Time what a loader's process does for one image, decoding included, against plain torchvision on the same core.

    python benchmarks/loader.py
    python benchmarks/loader.py --data /path/to/images --output loader.json

DINOv2's recipe: two crops of 224 pixels, eight of 96, from JPEGs of 500 x 375 (photographs that come with scikit-image
and scikit-learn, or the first images of `--data`, resized to that). Three ways take turns on one thread of one core:

* reference: Pillow and torchvision's transforms in the order of DINOv2's `DataAugmentationDINO`, with ToTensor and
  normalisation, and the blur probabilities that the paper states;
* cpu: ours with `data.augment_on=cpu`, up to the float32 crops (normalised later, on the device);
* device: ours with `data.augment_on=device`, where the process decodes, draws, and hands over 8-bit images.

Times are those of the thread, medians over the repeats; what another process takes from the core does not count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402 (after the path guard)
from PIL import Image  # noqa: E402
from torchvision import transforms as tv  # noqa: E402

from dinov2_equi.data.augmentations import DataAugmentationDINO  # noqa: E402
from dinov2_equi.data.collate import SourceSample  # noqa: E402
from dinov2_equi.data.datasets.base import ImageDataset  # noqa: E402
from dinov2_equi.data.datasets.folder import ImageFolder  # noqa: E402
from dinov2_equi.data.datasets.make import make_dataset  # noqa: E402
from dinov2_equi.data.device_augmentation import plan_crops  # noqa: E402
from dinov2_equi.data.loaders import MultiCropDataset, SourceDataset  # noqa: E402
from dinov2_equi.data.transforms import IMAGENET_MEAN, IMAGENET_STD  # noqa: E402
from dinov2_equi.evaluation.results import write_results  # noqa: E402
from dinov2_equi.run.allocator import keep_freed_memory  # noqa: E402

JPEG_SIZE = (500, 375)  # width, height: a common size in ImageNet
JPEG_QUALITY = 90
GLOBAL_SCALE, LOCAL_SCALE, NUM_LOCAL = (0.32, 1.0), (0.05, 0.32), 8
GLOBAL_SIZE, LOCAL_SIZE = 224, 96


def write_jpegs(source: ImageDataset, folder: Path, count: int) -> None:
    """Write `count` images of a data set as JPEGs of one size."""
    for number in range(count):
        image = source.load(number % len(source)).resize(JPEG_SIZE, Image.Resampling.BICUBIC)
        image.save(folder / f"{number:04d}.jpg", quality=JPEG_QUALITY)


class PlainAugmentation:
    """The reference: every operation by torchvision on Pillow images, one crop after the other."""

    def __init__(self) -> None:
        jitter = tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        blur = tv.GaussianBlur(kernel_size=9, sigma=(0.1, 2.0))
        tensor = [tv.ToTensor(), tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)]

        def recipe(size: int, scale: tuple[float, float], *further: torch.nn.Module) -> tv.Compose:
            crop = tv.RandomResizedCrop(size, scale=scale, interpolation=tv.InterpolationMode.BICUBIC)
            common = [crop, tv.RandomHorizontalFlip(), jitter, tv.RandomGrayscale(0.2)]
            return tv.Compose([*common, *further, *tensor])

        solarize = tv.RandomSolarize(threshold=128, p=0.2)
        first = recipe(GLOBAL_SIZE, GLOBAL_SCALE, blur)
        second = recipe(GLOBAL_SIZE, GLOBAL_SCALE, tv.RandomApply([blur], p=0.1), solarize)
        local = recipe(LOCAL_SIZE, LOCAL_SCALE, tv.RandomApply([blur], p=0.5))
        self._recipes = [first, second, *[local] * NUM_LOCAL]

    def __call__(self, path: Path) -> list[torch.Tensor]:
        """Return all crops of the image at `path`."""
        with Image.open(path) as file:
            image = file.convert("RGB")
        return [recipe(image) for recipe in self._recipes]


def ways_of(folder: Path) -> tuple[int, dict[str, Callable[[int], object]]]:
    """Return the number of images below a folder, and each way by name, as a function of the image's number."""
    dataset = ImageFolder(folder)
    augmentation = DataAugmentationDINO(GLOBAL_SCALE, LOCAL_SCALE, NUM_LOCAL, GLOBAL_SIZE, LOCAL_SIZE)
    plain = PlainAugmentation()
    crops, sources = MultiCropDataset(dataset, augmentation, seed=0), SourceDataset(dataset, augmentation, seed=0)

    def device(number: int) -> SourceSample:
        sample = sources[number]
        for choices, size in ((sample.choices.global_crops, GLOBAL_SIZE), (sample.choices.local_crops, LOCAL_SIZE)):
            plan_crops([choices], (size, size))  # as the collation does
        return sample

    return len(dataset), {
        "reference": lambda number: plain(folder / dataset.name(number)),
        "cpu": lambda number: crops[number],
        "device": device,
    }


def milliseconds(way: Callable[[int], object], count: int) -> float:
    """Return the thread's time for one image, a mean over `count`."""
    start = time.thread_time()
    for number in range(count):
        way(number)
    return 1000 * (time.thread_time() - start) / count


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sample_photos", help="data set or folder (default: sample_photos)")
    parser.add_argument("--images", type=int, default=32, help="images of one turn (default 32)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    return parser.parse_args()


def main() -> None:
    """Measure, print a table, and write it where asked."""
    arguments = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(make_dataset(arguments.data), Path(folder), arguments.images)
        count, ways = ways_of(Path(folder))
        times: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(arguments.repeats + 1):
            for name, way in ways.items():
                elapsed = milliseconds(way, count)
                if repeat:  # the first turn warms up
                    times[name].append(elapsed)
    numbers = {}
    print(f"{'':<12}{'ms/image':>12}{'images/s':>12}{'ratio':>12}")
    for name, values in times.items():
        ms = statistics.median(values)
        ratio = statistics.median(plain / ours for plain, ours in zip(times["reference"], values, strict=True))
        print(f"{name:<12}{ms:12.2f}{1000 / ms:12.0f}{ratio:12.2f}")
        numbers[name] = {"ms_per_image": ms, "images_per_second_and_core": 1000 / ms, "ratio": ratio}
    if arguments.output is not None:
        settings = {key: value for key, value in vars(arguments).items() if key != "output"}
        write_results(arguments.output, numbers, task="loader", settings=settings)


if __name__ == "__main__":
    main()
