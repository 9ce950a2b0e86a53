"""Do patch features move with the content of the image? No probe and no labels: a cosine, place by place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2_equi.equi import geometry
from dinov2_equi.equi.families.base import GeometricFamily, TransformFamily
from dinov2_equi.evaluation.dense_features import frozen_feature_map
from dinov2_equi.evaluation.eval_model import EvalModel

_COVERED = 0.999  # of a place whose four neighbours all lie in the image, up to rounding

COMPARISONS = ("moved", "unmoved", "other_image")


@dataclass(frozen=True)
class ComparedMaps:
    """Feature maps of a batch of images, what they should become, and what they do become."""

    plain: Tensor
    """[B, D, h, w] features of the images."""

    expected: Tensor
    """[B, D, h, w] the same, moved as the content of the images moves."""

    found: Tensor
    """[B, D, h, w] features of the transformed images."""

    covered: Tensor
    """[B, h, w] bool, places whose content was in the image before."""


def feature_maps_moved(maps: Tensor, moves: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return feature maps after a planar map of their images, and where they are covered.

    Args:
        maps: [B, D, h, w].
        moves: [B, 3, 3] forward maps in pixels of the images, see `geometry`.
        size: (H, W) of the images.

    Returns:
        [B, D, h, w], bilinear, and [B, h, w] bool.
    """
    h, w = maps.shape[-2:]
    to_grid = torch.diag(moves.new_tensor([w / size[1], h / size[0], 1.0]))
    on_grid = geometry.compose(to_grid, geometry.compose(moves, geometry.inverse(to_grid)))
    layers = torch.cat([maps, torch.ones_like(maps[:, :1])], dim=1)
    moved = geometry.warp(layers, on_grid[None], fill="zeros")[0]
    return moved[:, :-1], moved[:, -1] > _COVERED


def compare_maps(
    model: EvalModel, images: Tensor, family: TransformFamily, theta: Tensor, *, features: str = "patches"
) -> ComparedMaps:
    """Return the feature maps of images, moved with their content, and of the transformed images.

    A family that is not geometric moves nothing: features should stay as they are.

    Args:
        model: its weights live on the device of the images.
        images: [B, 3, H, W] in [0, 1].
        family: one of `equi.families`.
        theta: [B, P] its parameters.
        features: one of `dense_features.DENSE_FEATURES`.
    """
    size = (images.shape[-2], images.shape[-1])
    plain = frozen_feature_map(model, images, features=features)
    found = frozen_feature_map(model, family.apply(images, theta), features=features)
    expected, covered = plain, torch.ones_like(plain[:, 0], dtype=torch.bool)
    if isinstance(family, GeometricFamily):
        moves = family.maps(theta.to(images.device, torch.float32), size)
        expected, covered = feature_maps_moved(plain, moves, size)
    return ComparedMaps(plain, expected, found, covered)


def dense_equivariance(
    model: EvalModel,
    images: Tensor,
    families: Mapping[str, TransformFamily],
    *,
    features: str = "patches",
    seed: int = 0,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    on_batch: Callable[[], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Return mean cosines by family, over all covered places of all images.

    The parameters depend on seed, family and number of images alone.

    Args:
        model: its weights live on `device`.
        images: [n, 3, H, W] in [0, 1], n >= 2; sides in whole patches.
        families: by name.
        features: one of `dense_features.DENSE_FEATURES`.
        seed: of the transforms.
        batch_size: images in one forward pass, at least 2.
        device: where to compute.
        on_batch: called after each batch.

    Returns:
        Family -> `moved`: features of the transformed image against those of the image moved with its content;
        `unmoved`: against those of the image as they lie; `other_image`: against those of another image, moved
        likewise. The same with `_centred`, after the mean feature of all places and images is taken off: features with
        a large common part are alike whatever they show.

    Raises:
        ValueError: for fewer than two images or a batch of one.
    """
    if len(images) < 2 or batch_size < 2:
        raise ValueError(f"expected at least two images in a batch, got {len(images)} images, batches of {batch_size}")
    mean = _mean_feature(model, images, features, batch_size, device)  # [D, 1, 1]
    numbers = {}
    for name, family in families.items():
        theta = family.draw(len(images), torch.Generator().manual_seed(seed)).float()
        total = torch.zeros(2 * len(COMPARISONS), dtype=torch.float64)
        places = 0
        for part in _parts(len(images), batch_size):
            maps = compare_maps(model, images[part].to(device), family, theta[part], features=features)
            total += _cosine_sums(maps, mean).cpu()
            places += int(maps.covered.sum())
            if on_batch is not None:
                on_batch()
        labels = [f"{label}{suffix}" for suffix in ("", "_centred") for label in COMPARISONS]
        numbers[name] = dict(zip(labels, (total / max(places, 1)).tolist(), strict=True))
    return numbers


def _cosine_sums(maps: ComparedMaps, mean: Tensor) -> Tensor:
    """Return the sums of the cosines over the covered places [6]: three comparisons, then centred."""
    others = maps.expected.roll(1, dims=0)
    sums = []
    for offset in (torch.zeros_like(mean), mean):
        found = maps.found - offset
        for reference in (maps.expected, maps.plain, others):
            cosine = F.cosine_similarity(found, reference - offset, dim=1)  # [B, h, w]
            sums.append((cosine * maps.covered).double().sum())
    return torch.stack(sums)


def _mean_feature(
    model: EvalModel, images: Tensor, features: str, batch_size: int, device: torch.device | str
) -> Tensor:
    """Return the mean feature of all places and images, [D, 1, 1]."""
    sums = [
        frozen_feature_map(model, images[part].to(device), features=features).mean(dim=(2, 3)).sum(dim=0)
        for part in _parts(len(images), batch_size)
    ]
    return (torch.stack(sums).sum(dim=0) / len(images))[:, None, None]


def _parts(count: int, batch_size: int) -> Iterator[slice]:
    """Yield slices of at most `batch_size`; a rest of one joins the batch before it, so that each has two images."""
    start = 0
    while start < count:
        stop = count if count - start <= batch_size + 1 else start + batch_size
        yield slice(start, stop)
        start = stop
