"""Files damaged at random: an image or the one named error, quickly, in bounded memory."""

from __future__ import annotations

import io
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_equi.data.augmentations import DataAugmentationDINO
from dinov2_equi.data.bad_images import check_shape
from dinov2_equi.data.datasets.base import UnreadableImageError
from dinov2_equi.data.datasets.decode import MAX_PIXELS, decode_rgb, decode_tensor
from dinov2_equi.data.datasets.folder import ImageFolder
from dinov2_equi.data.datasets.jpeg import decode_common_jpeg
from dinov2_equi.data.loaders import MultiCropDataset

MAX_SECONDS = 2.0
MAX_GROWTH_BYTES = 2.5 * 2**30  # an image of 100 million pixels of 16 bits, see `MAX_PIXELS`
FORMATS = {
    "jpeg": ("RGB", {"quality": 90}),
    "progressive.jpeg": ("RGB", {"quality": 80, "progressive": True}),
    "cmyk.jpeg": ("CMYK", {}),
    "png": ("RGB", {}),
    "palette.png": ("P", {}),
    "alpha.png": ("RGBA", {}),
    "deep.png": ("I;16", {}),
    "webp": ("RGB", {"quality": 80}),
    "tiff": ("RGB", {}),
    "lzw.tiff": ("RGB", {"compression": "tiff_lzw"}),
    "float.tiff": ("F", {}),
    "bmp": ("RGB", {}),
}


def photograph() -> Image.Image:
    """Smooth shapes with some noise: like a photograph to a compressor, 80 x 60 pixels."""
    y, x = np.mgrid[0:60, 0:80]
    rng = np.random.default_rng(0)
    waves = [127 + 80 * np.sin(x / a + y / b) + rng.normal(0, 8, x.shape) for a, b in ((9, 20), (15, 7), (30, 11))]
    return Image.fromarray(np.stack(waves, 2).clip(0, 255).astype(np.uint8))


def encoded() -> dict[str, bytes]:
    files = {}
    for name, (mode, options) in FORMATS.items():
        image = photograph()
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        else:
            image = image.convert(mode)
        file = io.BytesIO()
        exif = Image.Exif()
        if name != "jpeg":  # that one is decoded the fast way, which leaves turned images alone
            exif[0x0112] = 6
        image.save(file, name.rsplit(".", 1)[-1], exif=exif, **options)
        files[name] = file.getvalue()
    return files


def mutations(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of damaged files: bytes changed, cut, doubled, emptied, joined."""
    rng = np.random.default_rng(seed)
    files = encoded()
    names = list(files)
    for number in range(count):
        name = names[number % len(names)]
        content = bytearray(files[name])
        size = len(content)
        kind = int(rng.integers(7))
        first, last = sorted(rng.integers(0, size, 2).tolist())
        if kind == 0:
            for place in rng.integers(0, size, int(rng.integers(1, 9))):
                content[place] = int(rng.integers(256))
        elif kind == 1:  # the header, where sizes and types stand
            for place in rng.integers(0, min(size, 200), int(rng.integers(1, 5))):
                content[place] = int(rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))]))
        elif kind == 2:
            content = content[:first]
        elif kind == 3:
            content[first:last] = bytes(last - first)
        elif kind == 4:
            content[first:first] = content[first:last]
        elif kind == 5:
            del content[first : first + int(rng.integers(1, 20))]
        else:
            content = content[:first] + files[str(rng.choice(names))][first:]
        yield name, bytes(content)


def check_mutations(count: int, seed: int) -> int:
    """Return how many of the damaged files still give an image."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    readable = 0
    for name, content in mutations(count, seed):
        started = time.thread_time()
        try:
            check_shape(decode_tensor(content, name, 64), name)
            readable += 1
        except UnreadableImageError as error:
            assert error.path == name and name in str(error)
        assert time.thread_time() - started < MAX_SECONDS
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MAX_GROWTH_BYTES
    return readable


def test_damaged_files_give_an_image_or_the_named_error() -> None:
    assert 60 < check_mutations(240, seed=1) < 200  # both must happen, or the test looks at one of them alone


def test_damaged_jpegs_decoded_fast_are_those_that_pillow_decodes() -> None:
    pytest.importorskip("simplejpeg")
    num_fast = 0
    for name, content in mutations(600, seed=4):
        pixels = decode_common_jpeg(content, 30, MAX_PIXELS)
        if pixels is not None:
            num_fast += 1
            assert np.array_equal(pixels, np.asarray(decode_rgb(io.BytesIO(content), name, 30)))
    assert num_fast > 5


@pytest.mark.slow
def test_ten_thousand_damaged_files_neither_crash_nor_hang_nor_fill_the_memory() -> None:
    assert 2500 < check_mutations(10_000, seed=2) < 8000


def test_order_among_damaged_files_is_the_same_after_a_resume(tmp_path: Path) -> None:
    for number, (name, content) in enumerate(mutations(60, seed=3)):
        (tmp_path / f"{number:03d}.{name}").write_bytes(content)

    def images() -> MultiCropDataset:
        return MultiCropDataset(ImageFolder(tmp_path), DataAugmentationDINO((0.3, 1), (0.1, 0.3), 1, 16, 8), seed=0)

    whole = images()
    samples = [whole[position] for position in range(40)]
    assert sum(len(sample.bad_images) for sample in samples) > 5
    for position in range(39, 19, -1):  # resumed at 20, and in another order
        again = images()[position]
        assert again.bad_images == samples[position].bad_images
        assert torch.equal(again.crops.global_crops, samples[position].crops.global_crops)
