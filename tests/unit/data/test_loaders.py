"""The same batches for any number of workers, after any resume and for any number of processes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from dinov2_equi.data.augmentations import DataAugmentationDINO
from dinov2_equi.data.bad_images import TooManyBadImagesError
from dinov2_equi.data.batch import Batch
from dinov2_equi.data.datasets.base import ImageDataset, UnreadableImageError
from dinov2_equi.data.datasets.folder import ImageFolder
from dinov2_equi.data.datasets.synthetic import SyntheticImages
from dinov2_equi.data.loaders import MultiCropDataset, make_train_loader
from dinov2_equi.data.masking import MaskingGenerator
from dinov2_equi.data.samplers import SampleOrder


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
        for name, tensor in left.tensors().items():
            assert torch.equal(tensor, right.tensors()[name]), name
        assert left.bad_images == right.bad_images


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


class Numbered(SyntheticImages):
    """Image i is of one colour, whose three bytes are i."""

    def load(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (index >> 16, index >> 8 & 255, index & 255))


def plain_augmentation() -> DataAugmentationDINO:
    """Return one that leaves the colour of an image as it is."""
    return DataAugmentationDINO(
        (1, 1), (1, 1), 0, 8, 8, jitter_prob=0, gray_prob=0, global_blur_probs=(0, 0), solarize_prob=0
    )


def shown(images: torch.Tensor) -> list[int]:
    """Return the numbers of `Numbered` images [B, 3, H, W]."""
    red, green, blue = (images.mean(dim=(2, 3)) * 255).round().int().unbind(1)
    return (red * 65536 + green * 256 + blue).tolist()


def test_each_epoch_shows_each_image_once() -> None:
    dataset = MultiCropDataset(Numbered(7), plain_augmentation(), seed=0)
    numbers = [shown(dataset[position].crops.global_crops[:1])[0] for position in range(14)]
    assert sorted(numbers[:7]) == sorted(numbers[7:]) == list(range(7))
    assert numbers[:7] != numbers[7:]


FAR, LARGE = 14_000_000, 1_281_167
"""A sample in the eleventh epoch of as many images as ImageNet-1k has."""


def far_loader(num_workers: int, rank: int = 0, world_size: int = 1) -> DataLoader[Batch]:
    """Return the loader of two steps of eight images from sample `FAR` on."""
    return make_train_loader(
        dataset=Numbered(LARGE),
        augmentation=plain_augmentation(),
        mask_generator=MaskingGenerator((1, 1)),
        mask_probability=0.5,
        mask_ratio_min_max=(0.1, 0.5),
        batch_size=8 // world_size,
        num_workers=num_workers,
        seed=5,
        start_step=FAR // 8,
        num_steps=2,
        rank=rank,
        world_size=world_size,
    )


def far_numbers(num_workers: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    batches = far_loader(num_workers, rank, world_size)
    return [shown(batch.global_crops[: 8 // world_size]) for batch in batches]


def test_a_resume_replays_the_samples_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    index = SampleOrder.index
    monkeypatch.setattr(SampleOrder, "index", lambda order, position: asked.append(position) or index(order, position))
    opened: list[int] = []
    load = Numbered.load
    monkeypatch.setattr(Numbered, "load", lambda images, number: opened.append(number) or load(images, number))
    far_numbers(num_workers=0)
    assert asked == list(range(FAR, FAR + 16))
    order = SampleOrder(LARGE, seed=5)
    assert opened == [index(order, position) for position in range(FAR, FAR + 16)]


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_or_processes_change_the_images_of_a_resume(num_workers: int) -> None:
    order = SampleOrder(LARGE, seed=5)
    numbers = [order.index(position) for position in range(FAR, FAR + 16)]
    assert len(set(numbers)) == 16
    assert far_numbers(num_workers) == [numbers[:8], numbers[8:]]
    if num_workers in (0, 2):
        ranks = [far_numbers(num_workers, rank, world_size=2) for rank in range(2)]
        assert [one + other for one, other in zip(*ranks, strict=True)] == [numbers[:8], numbers[8:]]


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


def write_noise(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")


def png_of_claimed_size(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes whose header claims any size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_a_header_that_claims_more_pixels_than_allowed_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png_of_claimed_size(12_000, 10_000))  # below Pillow's own limit
    with pytest.raises(UnreadableImageError, match="12000 x 10000 pixels are more than the 100,000,000"):
        ImageFolder(tmp_path).load_tensor(0, 64)


@pytest.fixture
def folder_with_bad_images(tmp_path: Path) -> ImageFolder:
    """Nine good images among eight bad ones, each bad in its own way."""
    folder = tmp_path / "photos"
    write_noise(folder, 9)
    good = (folder / "000.png").read_bytes()
    (folder / "a_no_image.jpg").write_bytes(b"nothing")
    (folder / "b_empty.png").write_bytes(b"")
    (folder / "c_cut_off.png").write_bytes(good[: len(good) // 2])
    (folder / "d_text.webp").write_text("<html>404</html>")
    Image.new("RGB", (1, 1)).save(folder / "e_pixel.png")
    Image.new("RGB", (1, 10_000)).save(folder / "f_line.png")
    Image.new("RGB", (10, 10_000)).save(folder / "g_strip.png")
    (folder / "h_bomb.png").write_bytes(png_of_claimed_size(40_000, 40_000))
    return ImageFolder(folder)


def test_bad_images_are_replaced_by_good_ones_and_reported_with_path_and_reason(
    folder_with_bad_images: ImageFolder,
) -> None:
    found = [image for batch in batches(folder_with_bad_images, num_steps=12) for image in batch.bad_images]
    reasons = {Path(image.path).name: image.reason for image in found}
    assert sorted(name[0] for name in reasons) == list("abcdefgh")
    assert "cannot identify" in reasons["a_no_image.jpg"]
    assert "1 x 1 pixels" in reasons["e_pixel.png"] and "10 x 10000 pixels" in reasons["g_strip.png"]
    assert "1600000000 pixels" in reasons["h_bomb.png"]
    assert all(folder_with_bad_images.name(image.index) == Path(image.path).name for image in found)


@pytest.mark.parametrize(("num_workers", "start_step"), [(2, 0), (0, 3), (2, 3)])
def test_bad_images_are_replaced_by_the_same_for_any_workers_and_after_a_resume(
    folder_with_bad_images: ImageFolder, num_workers: int, start_step: int
) -> None:
    again = batches(folder_with_bad_images, num_workers=num_workers, start_step=start_step, num_steps=6 - start_step)
    assert_equal_bit_for_bit(batches(folder_with_bad_images)[start_step:], again)


def test_a_good_image_keeps_its_crops_whatever_stands_beside_it(tmp_path: Path) -> None:
    write_noise(tmp_path, 7)
    before = MultiCropDataset(ImageFolder(tmp_path), augmentation(), seed=0)
    expected = [before[position].crops.global_crops for position in range(7)]
    (tmp_path / "003.png").write_bytes(b"")
    after = MultiCropDataset(ImageFolder(tmp_path), augmentation(), seed=0)
    changed = [not torch.equal(after[position].crops.global_crops, expected[position]) for position in range(7)]
    assert changed == [bool(after[position].bad_images) for position in range(7)] and sum(changed) == 1


def test_a_data_set_without_a_single_good_image_is_given_up_and_not_read_for_ever(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    with pytest.raises(TooManyBadImagesError, match=r"64 images in a row.*broken\.jpg"):
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
