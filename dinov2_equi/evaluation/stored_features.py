"""Features of a whole data set on disk, so that every classifier after the first reads them instead of the images."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov2_equi.data.datasets.base import ImageDataset
from dinov2_equi.data.datasets.blocks import spread_images
from dinov2_equi.data.transforms import EvalTransform
from dinov2_equi.evaluation.eval_model import BlockTokens, EvalModel
from dinov2_equi.evaluation.labelled import image_batches

FORMAT = 1
MAX_BLOCKS = 4
_NUM_SAMPLES = 16
"""Images, evenly spread, whose pixels are part of what identifies a data set."""

_CLS, _PATCH_MEAN, _FACTS = "cls.npy", "patch_mean.npy", "facts.json"

Array = npt.NDArray[np.float16]


@dataclass(frozen=True)
class StoredFeatures:
    """Features of the images of a data set, in its order; float16, memory-mapped."""

    cls: Array
    """[n, K, D] class tokens of the last K blocks, the last one last."""

    patch_mean: Array
    """[n, D] mean patch token of the last block."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.cls)

    def select(self, name: str) -> Tensor:
        """Return `cls`, `patch_mean`, or `both`, of the last block: float32 [n, F] in memory.

        Raises:
            ValueError: for another name.
        """
        last = self.cls[:, -1]
        parts = {"cls": [last], "patch_mean": [self.patch_mean], "both": [last, self.patch_mean]}
        if name not in parts:
            raise ValueError(f"no features {name!r}; choose cls, patch_mean or both")
        return torch.from_numpy(np.concatenate(parts[name], axis=1).astype(np.float32))

    def take(self, rows: npt.NDArray[np.int64]) -> StoredFeatures:
        """Return the features of some images, in memory."""
        return StoredFeatures(self.cls[rows], self.patch_mean[rows])

    def batch(self, rows: npt.NDArray[np.int64]) -> BlockTokens:
        """Return the tokens of some images, float32."""
        cls, mean = (np.asarray(array[rows], dtype=np.float32) for array in (self.cls, self.patch_mean))
        return BlockTokens(torch.from_numpy(cls), torch.from_numpy(mean))


def stored_features(
    model: EvalModel,
    dataset: ImageDataset,
    *,
    size: int,
    folder: Path,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    num_workers: int = 0,
    on_batch: Callable[[], None] | None = None,
) -> StoredFeatures:
    """Return the features of a data set, from disk where the same ones were computed before.

    They are the same where the weights, the normalisation, the data set (names, classes, and the pixels of a few
    images) and the image size are. The arrays are written under a temporary name and renamed.

    Args:
        model: its weights live on `device`.
        dataset: the images.
        size: side to which they are resized and cropped, pixels.
        folder: of all stored features; each set has a folder of its own in it.
        device: where the backbone runs.
        batch_size: images in one forward pass; it does not change what is stored beyond rounding.
        num_workers: processes that decode images.
        on_batch: called after each forward pass; not at all where the features are on disk.

    Raises:
        OSError: if they cannot be written.
    """
    identity = _identity(model, dataset, size)
    place = folder / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    if not place.is_dir():
        pending = place.with_name(f".{place.name}.{os.getpid()}")
        shutil.rmtree(pending, ignore_errors=True)
        pending.mkdir(parents=True)
        try:
            loader = image_batches(dataset, EvalTransform(size), batch_size=batch_size, num_workers=num_workers)
            _write(pending, _tokens(model, loader, device, on_batch or _nothing), len(dataset))
            (pending / _FACTS).write_text(json.dumps(identity, indent=1), encoding="utf-8")
            pending.rename(place)
        finally:
            shutil.rmtree(pending, ignore_errors=True)
    return StoredFeatures(np.load(place / _CLS, mmap_mode="r"), np.load(place / _PATCH_MEAN, mmap_mode="r"))


def computed_features(
    model: EvalModel,
    dataset: ImageDataset,
    *,
    size: int,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> StoredFeatures:
    """Return the features of a data set in memory and not on disk; see `stored_features`."""
    loader = image_batches(dataset, EvalTransform(size), batch_size=batch_size)
    batches = list(_tokens(model, loader, device, _nothing))
    cls, patch_mean = (torch.cat(tensors).half().cpu().numpy() for tensors in zip(*batches, strict=True))
    return StoredFeatures(cls, patch_mean)


def _nothing() -> None:
    """Do nothing after a batch."""


def _tokens(
    model: EvalModel, images: Iterable[Tensor], device: torch.device | str, on_batch: Callable[[], None]
) -> Iterator[BlockTokens]:
    for batch in images:
        yield model.block_tokens(batch.to(device), min(MAX_BLOCKS, model.num_blocks))
        on_batch()


def _write(folder: Path, batches: Iterator[BlockTokens], count: int) -> None:
    """Write the tokens of `count` images."""
    arrays: list[Array] = []
    start = 0
    for tokens in batches:
        if not arrays:
            for name, values in zip((_CLS, _PATCH_MEAN), tokens, strict=True):
                shape = (count, *values.shape[1:])
                arrays.append(np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.float16, shape=shape))
        stop = start + len(tokens.cls)
        for array, values in zip(arrays, tokens, strict=True):
            array[start:stop] = values.half().cpu().numpy()
        start = stop
    assert start == count
    for array in arrays:
        array.flush()  # type: ignore[attr-defined]


def _identity(model: EvalModel, dataset: ImageDataset, size: int) -> dict[str, Any]:
    """Return what the features depend on."""
    return {
        "format": FORMAT,
        "weights": weights_digest(model.backbone),
        "backbone": type(model.backbone).__name__,
        "mean": list(model.mean),
        "std": list(model.std),
        "images": dataset_digest(dataset),
        "num_images": len(dataset),
        "size": size,
    }


def weights_digest(module: torch.nn.Module) -> str:
    """Return a SHA-256 of the names and values of all tensors of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def dataset_digest(dataset: ImageDataset) -> str:
    """Return a SHA-256 of the names and classes of all images, and of the pixels of a few of them."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        digest.update(dataset.name(index).encode() + b"\0")
    digest.update(json.dumps([dataset.targets, dataset.classes]).encode())
    for index in spread_images(dataset, _NUM_SAMPLES):
        image = dataset.load_tensor(index)
        digest.update(str(list(image.shape)).encode() + image.contiguous().numpy().tobytes())
    return digest.hexdigest()
