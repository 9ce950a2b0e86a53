"""The same batches for any number of workers, after any resume and for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper

from dinov2_equi.data.augmentations import DataAugmentationDINO
from dinov2_equi.data.batch import Batch
from dinov2_equi.data.datasets.base import ImageDataset, UnreadableImageError
from dinov2_equi.data.datasets.folder import ImageFolder
from dinov2_equi.data.datasets.synthetic import SyntheticImages
from dinov2_equi.data.loaders import MultiCropDataset, make_train_loader
from dinov2_equi.data.masking import MaskingGenerator


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def augmentation(size: int = 16) -> DataAugmentationDINO:
    return DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, size, 8)


def batches(dataset: ImageDataset | None = None, **changes: int) -> list[Batch]:
    settings = {"batch_size": 3, "num_workers": 0, "seed": 5, "start_step": 0, "num_steps": 6, **changes}
    loader = make_train_loader(
        dataset=dataset or SyntheticImages(7, (24, 32)),
        augmentation=augmentation(),
        mask_generator=MaskingGenerator((4, 4)),
        mask_probability=0.5,
        mask_ratio_min_max=(0.1, 0.5),
        **settings,  # type: ignore[arg-type]
    )
    assert len(loader) == settings["num_steps"]
    return list(loader)


def assert_equal_bit_for_bit(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        for field in fields(Batch):
            assert torch.equal(getattr(left, field.name), getattr(right, field.name)), field.name


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_do_not_change_the_batches(num_workers: int) -> None:
    assert_equal_bit_for_bit(batches(), batches(num_workers=num_workers))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_run_gets_the_batches_of_the_whole_run(num_workers: int) -> None:
    assert_equal_bit_for_bit(batches()[4:], batches(start_step=4, num_steps=2, num_workers=num_workers))


def test_seed_changes_images_crops_and_masks() -> None:
    one, other = batches(num_steps=1)[0], batches(num_steps=1, seed=6)[0]
    assert not torch.equal(one.global_crops, other.global_crops)
    assert not torch.equal(one.masks, other.masks)
    assert torch.equal(one.positions, other.positions)


def test_an_image_has_other_crops_in_the_next_epoch() -> None:
    dataset = MultiCropDataset(SyntheticImages(1, (24, 32)), augmentation(), seed=0)
    assert not torch.equal(dataset[0].crops.global_crops, dataset[1].crops.global_crops)


def test_two_processes_take_together_the_images_of_one() -> None:
    whole = batches(batch_size=4, num_steps=3)
    halves = [batches(batch_size=2, num_steps=3, rank=rank, world_size=2) for rank in range(2)]
    for step in range(3):
        one = whole[step].global_crops.unflatten(0, (2, 4))  # [G*B, 3, H, W] -> [G, B, 3, H, W]
        two = torch.cat([half[step].global_crops.unflatten(0, (2, 2)) for half in halves], dim=1)
        assert torch.equal(one, two)


def test_each_epoch_shows_each_image_once() -> None:
    class Numbered(SyntheticImages):
        """Image i is of one colour, i."""

        def load(self, index: int) -> Image.Image:
            return Image.new("RGB", (8, 8), (index,) * 3)

    plain = DataAugmentationDINO(
        (1, 1), (1, 1), 0, 8, 8, jitter_prob=0, gray_prob=0, global_blur_probs=(0, 0), solarize_prob=0
    )
    dataset = MultiCropDataset(Numbered(7), plain, seed=0)
    shown = [round(float(dataset[position].crops.global_crops.mean()) * 255) for position in range(14)]
    assert sorted(shown[:7]) == sorted(shown[7:]) == list(range(7))
    assert shown[:7] != shown[7:]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_random_states_of_the_caller_are_not_disturbed(num_workers: int) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(4), np.random.rand(4)
    torch.manual_seed(3)
    np.random.seed(3)
    batches(num_workers=num_workers, num_steps=2)
    assert torch.equal(torch.rand(4), expected[0])
    assert np.array_equal(np.random.rand(4), expected[1])


def test_number_of_threads_changes_no_bit_and_is_restored() -> None:
    # A mean over 224 x 224 pixels is long enough to be split over threads.
    dataset = MultiCropDataset(SyntheticImages(3, (240, 256)), augmentation(224), seed=0)
    crops = []
    for num_threads in (1, 2, 4):
        torch.set_num_threads(num_threads)
        crops.append(torch.stack([dataset[position].crops.global_crops for position in range(4)]))
        assert torch.get_num_threads() == num_threads
    assert torch.equal(crops[0], crops[1]) and torch.equal(crops[0], crops[2])


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    with pytest.raises(UnreadableImageError, match=r"broken\.jpg"):
        batches(ImageFolder(tmp_path))


def test_unreadable_image_keeps_its_error_type_on_the_way_from_a_worker() -> None:
    # A worker's error is rebuilt from type and message. (With a real worker PyTorch takes 5 s to stop afterwards.)
    try:
        raise UnreadableImageError("cannot read broken.jpg")
    except UnreadableImageError as error:
        sent = ExceptionWrapper((type(error), error, error.__traceback__))
    with pytest.raises(UnreadableImageError, match=r"broken\.jpg"):
        sent.reraise()


def test_large_jpeg_is_decoded_no_larger_than_the_crops_need(tmp_path: Path) -> None:
    Image.new("RGB", (800, 640)).save(tmp_path / "x.jpg")
    asked: list[int | None] = []

    class Recording(ImageFolder):
        def load_tensor(self, index: int, min_short_side: int | None = None) -> torch.Tensor:
            asked.append(min_short_side)
            return super().load_tensor(index, min_short_side)

    MultiCropDataset(Recording(tmp_path), augmentation(), seed=0)[0]
    assert asked == [augmentation().min_source_side]
