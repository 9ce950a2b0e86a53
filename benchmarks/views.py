"""Time the second view and the path towards it against Pillow's bicubic transforms on the same core.

    python benchmarks/views.py
    python benchmarks/views.py --families rotation perspective --output views.json

Both sides make the same batch: for each of the B crops, `num_steps` images of the path and the second view, float32 in
[0, 1], mirrored at the borders. Ours takes float32 crops and makes all images by one call on one thread. Pillow takes
8-bit crops, one at a time, and coefficients computed beforehand; as it knows no mirrored borders, a crop is padded once
for all its images, as far as they reach. `Pillow alone` leaves out padding and conversion. `torchvision` is what
code in the field does: for each image pad the crop by the furthest reach of the family, `affine` or `perspective` with
bicubic interpolation, cut out the centre, `to_tensor`.

The two run in turn on one core; the ratios are medians over the repeats of their times, which are those of the thread:
what another process takes from the core does not count. The last column says that they do the same thing: mean
difference in levels of 255, to which bilinear and bicubic interpolation, float and 8 bits amount.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402 (after the path guard)
import numpy.typing as npt  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402
from torch import Tensor  # noqa: E402
from torchvision.transforms import InterpolationMode  # noqa: E402
from torchvision.transforms.functional import to_tensor  # noqa: E402
from torchvision.transforms.v2 import functional as tvf  # noqa: E402

from dinov2_equi.equi import geometry  # noqa: E402
from dinov2_equi.equi.families.base import (  # noqa: E402
    PUBLISHED_CROP_SIZE,
    FamilySettings,
    GeometricFamily,
    TransformFamily,
)
from dinov2_equi.equi.families.registry import FAMILIES, MIXTURE, build_family  # noqa: E402
from dinov2_equi.equi.sampling import path_points  # noqa: E402
from dinov2_equi.equi.views import make_views  # noqa: E402
from dinov2_equi.evaluation.results import write_results  # noqa: E402
from dinov2_equi.run.allocator import keep_freed_memory  # noqa: E402

BLUR_KERNEL_PX, LEAST_SIGMA_PX = 13, 0.01

PillowOp = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Timing:
    """Medians over the repeats; times in milliseconds for each crop, with all images made of it."""

    family: str
    ours_ms: float
    pillow_ms: float
    pillow_alone_ms: float
    ratio: float
    ratio_alone: float
    torchvision_ms: float
    ratio_torchvision: float
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


@dataclass(frozen=True)
class PillowCrop:
    """How Pillow makes the images of one crop: how far it is padded on each side, and an operation for each image."""

    margin: int
    ops: list[PillowOp]


def pillow_crop(name: str, family: TransformFamily, points: Tensor, size: int) -> PillowCrop:
    """Return Pillow's equivalents of the transforms [S, P] of one crop of `size` pixels a side."""
    if isinstance(family, GeometricFamily):
        backward = geometry.inverse(family.maps(points, (size, size)))  # [S, 3, 3]
        edges = geometry.transform_points(backward, geometry.corners((size, size)))  # [S, 4, 2]
        margin = max(0, math.ceil(edges.abs().max().item() - size / 2)) + 1
        return PillowCrop(margin, [_planar_op(step, size, margin) for step in backward])
    if name == "blur":
        return PillowCrop(0, [_blur_op(point.item()) for point in points])
    return PillowCrop(0, [partial(_change_colors, deltas=point.tolist()) for point in points])


def _planar_op(backward: Tensor, size: int, margin: int) -> PillowOp:
    """Return Pillow's transform for a backward map [3, 3]; it counts pixels from the top left of the padded crop."""
    to_centre = geometry.translation(torch.tensor([-size / 2, -size / 2]))
    from_centre = geometry.translation(torch.tensor([size / 2 + margin, size / 2 + margin]))
    coefficients = geometry.compose(from_centre, geometry.compose(backward, to_centre))
    entries = (coefficients / coefficients[2, 2]).flatten().tolist()
    is_affine = entries[6] == entries[7] == 0
    method = Image.Transform.AFFINE if is_affine else Image.Transform.PERSPECTIVE
    data = entries[: 6 if is_affine else 8]
    return lambda image: image.transform((size, size), method, data, Image.Resampling.BICUBIC)


def _blur_op(sigma: float) -> PillowOp:
    return lambda image: image.filter(ImageFilter.GaussianBlur(sigma))


def torchvision_op(name: str, values: Mapping[str, float], size: int) -> PillowOp:
    """Return torchvision's transform of a Pillow image for one point of a family, by the names of its parameters."""
    if name == "color":
        return partial(_change_colors, deltas=list(values.values()))
    if name == "blur":
        sigma = max(values["sigma_px"], LEAST_SIGMA_PX)
        return lambda image: tvf.gaussian_blur(image, [BLUR_KERNEL_PX] * 2, [sigma] * 2)
    reach = _furthest_reach(values, size)
    moved = partial(_perspective, reach=reach) if name == "perspective" else _affine

    def op(image: Image.Image) -> Image.Image:
        padded = tvf.pad(image, [reach] * 4, padding_mode="symmetric")
        cropped: Image.Image = tvf.center_crop(moved(padded, values), [size, size])
        return cropped

    return op


def _furthest_reach(values: Mapping[str, float], size: int) -> int:
    """Return how many pixels beyond a crop a family may look at, over the whole range of its parameters."""
    settings = FamilySettings()
    per_pixel = size / PUBLISHED_CROP_SIZE
    reach = 0.0
    if "rotation_deg" in values:
        reach += size * (math.sqrt(2) - 1) / 2  # half of what the diagonal is longer than the side
    if "log_zoom" in values:
        reach = (size / 2 + reach) * settings.max_zoom - size / 2
    if "translation_x_px" in values:
        reach += settings.max_translation_px * per_pixel
    if "top_left_x_px" in values:
        reach += 2 * settings.max_corner_px * per_pixel
    return math.ceil(reach)


def _affine(image: Image.Image, values: Mapping[str, float]) -> Image.Image:
    shift = [round(values.get(f"translation_{axis}_px", 0.0)) for axis in "xy"]
    zoom, angle = math.exp(values.get("log_zoom", 0.0)), -values.get("rotation_deg", 0.0)
    moved: Image.Image = tvf.affine(image, angle, shift, zoom, [0.0], interpolation=InterpolationMode.BICUBIC)
    return moved


def _perspective(image: Image.Image, values: Mapping[str, float], *, reach: int) -> Image.Image:
    low, high = reach, image.width - reach
    corners = [[low, low], [high, low], [high, high], [low, high]]
    offsets = list(values.values())
    ends = [[x + offsets[2 * i], y + offsets[2 * i + 1]] for i, (x, y) in enumerate(corners)]
    moved: Image.Image = tvf.perspective(image, corners, ends, interpolation=InterpolationMode.BICUBIC)
    return moved


def _change_colors(image: Image.Image, deltas: list[float]) -> Image.Image:
    """Return the image after torchvision's operations, which call Pillow."""
    image = tvf.adjust_brightness(image, 1 + deltas[0])
    image = tvf.adjust_contrast(image, 1 + deltas[1])
    image = tvf.adjust_saturation(image, 1 + deltas[2])
    return tvf.adjust_hue(image, deltas[3])


def measure(name: str, crops: Tensor, num_steps: int, repeats: int, generator: torch.Generator) -> Timing:
    """Time one family on crops [B, 3, H, W]."""
    family = build_family(name)
    theta = family.draw(len(crops), generator)
    points = path_points(family, theta, num_steps)  # [S + 1, B, P]
    arrays = list((crops * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy())  # B of [H, W, 3]

    def ours() -> Tensor:
        return make_views(crops, family, theta, num_steps, include_final=True).path

    pillow, pillow_alone = pillow_works(name, family, points, arrays)
    works: list[Callable[[], object]] = [ours, pillow, pillow_alone]
    works.append(torchvision_work(name, family, points, arrays))
    difference = float((255 * (ours() - pillow())).abs().mean())  # the first call of each warms it up
    times = [[_milliseconds(work) / len(crops) for work in works] for _ in range(repeats)]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    ratios = [statistics.median(row[k] / row[0] for row in times) for k in range(1, len(works))]
    return Timing(name, *medians[:3], *ratios[:2], medians[3], ratios[2], difference)


def pillow_works(
    name: str, family: TransformFamily, points: Tensor, arrays: Sequence[npt.NDArray[np.uint8]]
) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """Return what makes the batch [S + 1, B, 3, H, W] by Pillow, and the transforms of it alone."""
    size = len(arrays[0])
    recipes = [pillow_crop(name, family, points[:, b], size) for b in range(len(arrays))]
    padded = [_padded(array, recipe.margin) for array, recipe in zip(arrays, recipes, strict=True)]

    def whole() -> Tensor:
        batch = torch.empty(len(points), len(arrays), 3, size, size)
        for b, (array, recipe) in enumerate(zip(arrays, recipes, strict=True)):
            image = _padded(array, recipe.margin)
            for step, op in enumerate(recipe.ops):
                torch.div(tvf.pil_to_tensor(op(image)), 255, out=batch[step, b])
        return batch

    def alone() -> None:
        for image, recipe in zip(padded, recipes, strict=True):
            for op in recipe.ops:
                op(image)

    return whole, alone


def torchvision_work(
    name: str, family: TransformFamily, points: Tensor, arrays: Sequence[npt.NDArray[np.uint8]]
) -> Callable[[], Tensor]:
    """Return what makes the batch [S + 1, B, 3, H, W] as code in the field does."""
    size = len(arrays[0])

    def op_of(point: Tensor) -> PillowOp:
        return torchvision_op(name, dict(zip(family.param_names, point.tolist(), strict=True)), size)

    ops = [[op_of(point) for point in points[:, b]] for b in range(len(arrays))]

    def work() -> Tensor:
        batch = torch.empty(len(points), len(arrays), 3, size, size)
        for b, array in enumerate(arrays):
            image = Image.fromarray(array)
            for step, op in enumerate(ops[b]):
                batch[step, b] = to_tensor(op(image))
        return batch

    return work


def _padded(array: npt.NDArray[np.uint8], margin: int) -> Image.Image:
    """Return an image [H, W, 3], mirrored at its edges by `margin` pixels on each side."""
    if margin:
        array = np.pad(array, ((margin, margin), (margin, margin), (0, 0)), mode="symmetric")
    return Image.fromarray(array)


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return 1000 * (time.thread_time() - start)


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
    titles = (
        "ours ms/crop",
        "Pillow ms/crop",
        "Pillow alone",
        "ratio",
        "ratio alone",
        "torchvision",
        "ratio",
        "difference",
    )
    print(f"{'family':<12}" + "".join(f"{title:>15}" for title in titles))
    timings = []
    for name in arguments.families:
        timing = measure(name, crops, arguments.num_steps, arguments.repeats, generator)
        print(
            f"{timing.family:<12}"
            + "".join(
                f"{'-':>15}" if value is None else f"{value:15.2f}" for value in list(asdict(timing).values())[1:]
            ),
            flush=True,
        )
        timings.append(timing)
    if arguments.output is not None:
        settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "seed")}
        numbers = {timing.family: asdict(timing) for timing in timings}
        write_results(arguments.output, numbers, task="views", seed=arguments.seed, settings=settings)


if __name__ == "__main__":
    main()
