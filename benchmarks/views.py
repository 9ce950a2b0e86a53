"""Time the second view and the path towards it against Pillow's bicubic transforms on the same core.

    python benchmarks/views.py
    python benchmarks/views.py --families rotation perspective --output views.json

Both sides make the same images: for each of the B crops, `num_steps` images of the path and the second view. Ours takes
float32 crops and makes all images by one call on one thread. Pillow takes 8-bit crops, one at a time, and coefficients
computed beforehand. The two run in turn on one core; the ratio is the median over the repeats of their times, which are
those of the thread: what another process takes from the core does not count. The last column says that they do the same
thing: mean difference in the middle of the images, in levels of 255, to which bilinear and bicubic interpolation, float
and 8 bits amount.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402 (after the path guard)
import torch.nn.functional as F  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402
from torch import Tensor  # noqa: E402
from torchvision.transforms.v2 import functional as tvf  # noqa: E402

from dinov2_equi.equi import geometry  # noqa: E402
from dinov2_equi.equi.families.base import GeometricFamily, TransformFamily  # noqa: E402
from dinov2_equi.equi.families.registry import FAMILIES, MIXTURE, build_family  # noqa: E402
from dinov2_equi.equi.sampling import path_points  # noqa: E402
from dinov2_equi.equi.views import make_views  # noqa: E402
from dinov2_equi.evaluation.results import write_results  # noqa: E402
from dinov2_equi.run.allocator import keep_freed_memory  # noqa: E402

PillowOp = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Timing:
    """Medians over the repeats; times in milliseconds for each crop, with all images made of it."""

    family: str
    ours_ms: float
    pillow_ms: float
    ratio: float
    difference_levels: float


def make_crops(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Return random images [B, 3, H, W] in [0, 1] with as much contrast in every octave, as photographs have."""
    crops = torch.zeros(count, 3, size, size)
    side = 4
    while side <= size:
        octave = torch.rand(count, 3, side, side, generator=generator) - 0.5
        crops += F.interpolate(octave, size=(size, size), mode="bicubic") * (4 / side) ** 0.5
        side *= 2
    return (0.5 + 0.5 * crops).clamp(0, 1)


def pillow_op(name: str, family: TransformFamily, theta: Tensor, size: int) -> PillowOp:
    """Return Pillow's equivalent of one transform, parameters [P]."""
    if name == "rotation":
        return lambda image: image.rotate(theta.item(), Image.Resampling.BICUBIC)
    if isinstance(family, GeometricFamily):
        return _planar_op(family.maps(theta, (size, size)), size)
    if name == "blur":
        return lambda image: image.filter(ImageFilter.GaussianBlur(theta.item()))
    return partial(_change_colors, deltas=theta.tolist())


def _planar_op(forward: Tensor, size: int) -> PillowOp:
    """Return Pillow's transform for a forward map [3, 3]: it wants the backward one, in pixels from the top left."""
    to_centre = geometry.translation(torch.tensor([-size / 2, -size / 2]))
    backward = geometry.compose(geometry.inverse(to_centre), geometry.compose(geometry.inverse(forward), to_centre))
    entries = (backward / backward[2, 2]).flatten().tolist()
    is_affine = entries[6] == entries[7] == 0
    method = Image.Transform.AFFINE if is_affine else Image.Transform.PERSPECTIVE
    data = entries[: 6 if is_affine else 8]
    return lambda image: image.transform((size, size), method, data, Image.Resampling.BICUBIC)


def _change_colors(image: Image.Image, deltas: list[float]) -> Image.Image:
    """Return the image after torchvision's operations, which call Pillow."""
    image = tvf.adjust_brightness(image, 1 + deltas[0])
    image = tvf.adjust_contrast(image, 1 + deltas[1])
    image = tvf.adjust_saturation(image, 1 + deltas[2])
    return tvf.adjust_hue(image, deltas[3])


def measure(name: str, crops: Tensor, num_steps: int, repeats: int, generator: torch.Generator) -> Timing:
    """Time one family on crops [B, 3, H, W]."""
    count, _, size, _ = crops.shape
    family = build_family(name)
    theta = family.draw(count, generator)
    points = path_points(family, theta, num_steps)  # [S + 1, B, P]
    ops = [[pillow_op(name, family, point[b], size) for b in range(count)] for point in points]
    images = [tvf.to_pil_image(crop) for crop in (crops * 255).round().byte()]

    def ours() -> Tensor:
        return make_views(crops, family, theta, num_steps, include_final=True).path

    def pillows() -> list[list[Image.Image]]:
        return [[op(image) for op, image in zip(row, images, strict=True)] for row in ops]

    difference = _difference_in_the_middle(ours(), pillows())  # the first call of each warms it up
    times = [(_milliseconds(ours) / count, _milliseconds(pillows) / count) for _ in range(repeats)]
    ours_ms, pillow_ms = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(pillow / our for our, pillow in times)
    return Timing(name, ours_ms, pillow_ms, ratio, difference)


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return 1000 * (time.thread_time() - start)


def _difference_in_the_middle(ours: Tensor, pillows: list[list[Image.Image]]) -> float:
    """Return the mean absolute difference in levels, away from what lies outside the source."""
    theirs = torch.stack([torch.stack([tvf.pil_to_tensor(image) for image in row]) for row in pillows])
    margin = ours.shape[-1] // 4
    middle = (..., slice(margin, -margin), slice(margin, -margin))
    return float((255 * ours[middle] - theirs[middle]).abs().mean())


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in FAMILIES if name != MIXTURE]
    parser.add_argument("--families", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="side of the crops, pixels (default 224)")
    parser.add_argument(
        "--num-steps", type=int, default=2, help="images of the path beside the second view (default 2)"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    return parser.parse_args()


def main() -> None:
    """Measure, print a table, and write it where asked."""
    arguments = parse_arguments()
    keep_freed_memory()  # as the training does
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # both sides on the same core
    generator = torch.Generator().manual_seed(arguments.seed)
    crops = make_crops(arguments.batch_size, arguments.size, generator)
    print(f"{'family':<14}{'ours ms/crop':>14}{'Pillow ms/crop':>16}{'ratio':>8}{'difference':>12}")
    timings = []
    for name in arguments.families:
        timing = measure(name, crops, arguments.num_steps, arguments.repeats, generator)
        print(
            f"{timing.family:<14}{timing.ours_ms:>14.2f}{timing.pillow_ms:>16.2f}{timing.ratio:>8.1f}"
            f"{timing.difference_levels:>12.2f}",
            flush=True,
        )
        timings.append(timing)
    if arguments.output is not None:
        settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "seed")}
        numbers = {timing.family: asdict(timing) for timing in timings}
        write_results(arguments.output, numbers, task="views", seed=arguments.seed, settings=settings)


if __name__ == "__main__":
    main()
