"""Batches for training: the same, bit for bit, for any number of workers and after any resume."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2_equi.data.augmentations import DataAugmentationDINO
from dinov2_equi.data.bad_images import BadImage, TooManyBadImagesError, check_shape
from dinov2_equi.data.batch import Batch
from dinov2_equi.data.collate import MaskRecipe, Sample, SourceSample, collate, collate_sources
from dinov2_equi.data.crop_pixels import use_one_thread
from dinov2_equi.data.datasets.base import ImageDataset, UnreadableImageError, path_of
from dinov2_equi.data.datasets.blocks import blocks_of
from dinov2_equi.data.masking import MaskingGenerator
from dinov2_equi.data.restarting_loader import RestartingLoader
from dinov2_equi.data.samplers import BlockOrder, PositionSampler, RandomStream, SampleOrder, random_generator
from dinov2_equi.data.signals import ignore_stop_signals
from dinov2_equi.data.source_batch import SourceBatch

_ATTEMPTS = 64  # images tried for one position: with half of them bad, one in 10^19 positions finds none


class PositionedImages:
    """Images by position: which image, and everything random about its crops, follow from (seed, position) alone.

    An image that cannot be used is replaced by others, drawn from (seed, position), until one can. PyTorch's own random
    state is neither read nor changed.

    Args:
        dataset: Where the images come from.
        augmentation: Draws and makes the crops.
        seed: Seed of the run.
    """

    def __init__(self, dataset: ImageDataset, augmentation: DataAugmentationDINO, seed: int) -> None:
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed
        blocks = blocks_of(dataset)
        self._order: SampleOrder | BlockOrder = SampleOrder(len(dataset), seed)
        if blocks is not None:
            self._order = BlockOrder(blocks.lengths, blocks.buffer, seed)

    def load(self, position: int) -> tuple[Tensor, tuple[BadImage, ...]]:
        """Return the image at a position of the training, position >= 0 without an upper end: uint8 [3, H, W].

        Also returned: the images that should have stood there and cannot be used.

        Raises:
            TooManyBadImagesError: Not one of `_ATTEMPTS` images in a row can be used; names the last.
        """
        bad: list[BadImage] = []
        for index in self._candidates(position):
            try:
                image = self.dataset.load_tensor(index, self.augmentation.min_source_side)
                return check_shape(image, path_of(self.dataset, index)), tuple(bad)
            except UnreadableImageError as error:
                bad.append(BadImage(index, error.path or path_of(self.dataset, index), error.reason))
        raise TooManyBadImagesError(
            f"none of {_ATTEMPTS} images in a row can be used; the last is {bad[-1].path}: {bad[-1].reason}. "
            "Look at the data set, and remove what is no image"
        )

    def _candidates(self, position: int) -> Iterator[int]:
        """Yield the numbers of the image at a position and of those that may stand in for it."""
        yield self._order.index(position)
        rng = random_generator(RandomStream.REPLACEMENT, self.seed, position)
        for _ in range(_ATTEMPTS - 1):
            yield int(rng.integers(len(self.dataset)))

    def generator(self, position: int) -> np.random.Generator:
        """Return the source of everything random about the crops at a position."""
        return random_generator(RandomStream.AUGMENTATION, self.seed, position)


class MultiCropDataset(PositionedImages, Dataset[Sample]):
    """Crops by position."""

    def __getitem__(self, position: int) -> Sample:
        """Return the crops of the image at a position; see `load`."""
        image, bad_images = self.load(position)
        with _one_thread():
            return Sample(self.augmentation(image, self.generator(position)), position, bad_images)


class SourceDataset(PositionedImages, Dataset[SourceSample]):
    """Images by position, with the choices of `MultiCropDataset`, to be cropped later."""

    def __getitem__(self, position: int) -> SourceSample:
        """Return the image at a position, and what to crop from it; see `load`."""
        source, bad_images = self.load(position)
        height, width = source.shape[-2:]
        choices = self.augmentation.draw((height, width), self.generator(position))
        return SourceSample(source, choices, position, bad_images)


def make_train_loader(
    *,
    dataset: ImageDataset,
    augmentation: DataAugmentationDINO,
    mask_generator: MaskingGenerator,
    mask_probability: float,
    mask_ratio_min_max: tuple[float, float],
    batch_size: int,
    num_workers: int,
    seed: int,
    start_step: int,
    num_steps: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    crop_later: bool = False,
) -> RestartingLoader[Batch | SourceBatch]:
    """Return a loader over the batches of steps start_step .. start_step + num_steps - 1 of one rank.

    Processes that are killed are replaced, and the batches stay what they are.

    Args:
        dataset: Where the images come from; at least one.
        augmentation: Makes the crops.
        mask_generator: Makes the masks; its grid must be that of the global crops.
        mask_probability: Share of the global crops that get a mask.
        mask_ratio_min_max: Least and greatest share of masked patches in such a crop.
        batch_size: Images of one rank in one step.
        num_workers: Processes that load; 0: in this process. Does not change the batches.
        seed: Seed of the run, >= 0.
        start_step: First step; a resumed run gives the number of steps already done.
        num_steps: Number of batches.
        rank: This process.
        world_size: Number of processes. The images of a step depend on world_size * batch_size alone.
        pin_memory: Copy batches to page-locked memory (for a CUDA device).
        crop_later: Yield the images with what is to be cropped from them: `on_device` makes the crops.
    """
    masks = MaskRecipe(mask_generator, mask_probability, mask_ratio_min_max, seed, world_size * batch_size)
    kind, collate_fn = _kind_of_samples(augmentation, masks, crop_later=crop_later)
    images = kind(dataset, augmentation, seed)

    def make_loader(first_step: int, count: int) -> DataLoader[Any]:
        return DataLoader(
            images,
            batch_sampler=PositionSampler(
                batch_size=batch_size, start_step=first_step, num_steps=count, rank=rank, world_size=world_size
            ),
            num_workers=num_workers,
            collate_fn=collate_fn,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
            # Without a generator of its own the loader would take a number from PyTorch's global one at each start.
            generator=torch.Generator().manual_seed(seed),
        )

    return RestartingLoader(make_loader, start_step=start_step, num_steps=num_steps)


def _kind_of_samples(
    augmentation: DataAugmentationDINO, masks: MaskRecipe, *, crop_later: bool
) -> tuple[type[Any], Callable[[Sequence[Any]], Any]]:
    """Return the data set that a worker reads, and what makes a batch of its samples."""
    if not crop_later:
        return MultiCropDataset, functools.partial(collate, masks=masks)
    sizes = (augmentation.global_crops_size, augmentation.local_crops_size)
    return SourceDataset, functools.partial(collate_sources, masks=masks, global_size=sizes[0], local_size=sizes[1])


def on_device(batch: Batch | SourceBatch, device: torch.device) -> Batch:
    """Return a batch of the loader on the device, cropped there if it was not before."""
    if isinstance(batch, SourceBatch):
        return batch.to(device, non_blocking=True).make_crops()
    return batch.to(device, non_blocking=True)


def _start_worker(_: int) -> None:
    """Keep a worker to one thread, or they would fight over the cores; signals are for the training process."""
    torch.set_num_threads(1)
    use_one_thread()
    ignore_stop_signals()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run with one thread: a sum split over several threads rounds otherwise, and workers have one."""
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
