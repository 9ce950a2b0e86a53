"""Normalisation and the transform of evaluation."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from dinov2_equi.data.datasets.synthetic import SyntheticImages
from dinov2_equi.data.transforms import IMAGENET_MEAN, IMAGENET_STD, EvalTransform, load_images, normalize


def test_normalize_equals_the_loop() -> None:
    images = torch.rand(2, 3, 4, 5)
    normalized = normalize(images)
    for channel in range(3):
        expected = (images[:, channel] - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        assert torch.allclose(normalized[:, channel], expected)


def test_normalize_takes_one_image_and_other_statistics() -> None:
    image = torch.full((3, 2, 2), 0.75, dtype=torch.float64)
    assert torch.equal(
        normalize(image, (0.5, 0.25, 0.75), (0.5, 1.0, 2.0))[:, 0, 0], torch.tensor([0.5, 0.5, 0.0]).double()
    )


def test_eval_keeps_the_centre() -> None:
    image = Image.new("RGB", (60, 20))
    image.paste((255, 255, 255), (20, 0, 40, 20))
    centre = EvalTransform(20, resize=20)(image)
    assert centre.shape == (3, 20, 20)
    assert torch.equal(centre, torch.ones(3, 20, 20))


def test_eval_resizes_the_shorter_side_by_256_over_224() -> None:
    transform = EvalTransform(224)
    assert transform.resize == 256
    assert EvalTransform((28, 42)).resize == 48
    assert EvalTransform((28, 42))(Image.new("RGB", (300, 100))).shape == (3, 28, 42)


@pytest.mark.parametrize("source_size", [(1, 1), (3, 500), (500, 3)])
def test_eval_takes_sources_of_any_shape(source_size: tuple[int, int]) -> None:
    values = EvalTransform(16)(torch.full((3, *source_size), 51, dtype=torch.uint8))
    assert values.shape == (3, 16, 16) and values.dtype == torch.float32
    assert torch.allclose(values, torch.tensor(0.2))


def test_images_are_loaded_in_the_order_of_the_indices() -> None:
    dataset = SyntheticImages(5, (20, 30))
    transform = EvalTransform(16)
    images = load_images(dataset, [3, 1], transform)
    assert images.shape == (2, 3, 16, 16)
    assert torch.equal(images[0], transform(dataset.load(3))) and torch.equal(images[1], transform(dataset.load(1)))


def test_faulty_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="resize 8"):
        EvalTransform(16, resize=8)
    with pytest.raises(ValueError, match="got"):
        EvalTransform(0)
