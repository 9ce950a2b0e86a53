"""Every part of the augmentation at probability 0 and 1, and the laws of what is drawn."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tvf

from dinov2_equi.data import augmentations
from dinov2_equi.data.augmentations import (
    ColorJitter,
    CropParams,
    CropRecipe,
    Crops,
    DataAugmentationDINO,
    draw_box,
    make_crop,
)
from dinov2_equi.data.color import gaussian_blur

SIZE = (24, 30)
OFF = {
    "flip_prob": 0.0,
    "jitter_prob": 0.0,
    "gray_prob": 0.0,
    "global_blur_probs": (0.0, 0.0),
    "local_blur_prob": 0.0,
    "solarize_prob": 0.0,
}
NUM_SEEDS = 20


def random_source(height: int = SIZE[0], width: int = SIZE[1]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture
def whole_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every cut-out be the whole source."""
    monkeypatch.setattr(augmentations, "draw_box", lambda source_size, scale, rng: (0, 0, *source_size))


def whole_image_augmentation(**changes: object) -> DataAugmentationDINO:
    """With the fixture `whole_image` a crop is the source: only what `changes` switches on can alter a pixel."""
    return DataAugmentationDINO((1.0, 1.0), (1.0, 1.0), 3, SIZE, SIZE, **{**OFF, **changes})  # type: ignore[arg-type]


def crops_of_seeds(augmentation: DataAugmentationDINO) -> list[Crops]:
    return [augmentation(random_source(), np.random.default_rng(seed)) for seed in range(NUM_SEEDS)]


def unchanged() -> Tensor:
    return random_source().float() / 255


def differs(crops: Tensor) -> list[bool]:
    """Say for each of [C, 3, H, W] whether it is another picture than the source."""
    return [not torch.equal(crop, unchanged()) for crop in crops]


@pytest.mark.usefixtures("whole_image")
def test_all_probabilities_0_leave_every_pixel() -> None:
    for crops in crops_of_seeds(whole_image_augmentation()):
        assert crops.global_crops.shape == (2, 3, *SIZE)
        assert crops.local_crops.shape == (3, 3, *SIZE)
        assert differs(crops.global_crops) == [False] * 2
        assert differs(crops.local_crops) == [False] * 3


@pytest.mark.usefixtures("whole_image")
def test_flip_at_probability_1_mirrors_left_and_right_in_every_crop() -> None:
    for crops in crops_of_seeds(whole_image_augmentation(flip_prob=1.0)):
        for crop in (*crops.global_crops, *crops.local_crops):
            assert torch.equal(crop, unchanged().flip(2))


@pytest.mark.usefixtures("whole_image")
def test_jitter_at_probability_1_changes_every_crop_in_another_way() -> None:
    for crops in crops_of_seeds(whole_image_augmentation(jitter_prob=1.0)):
        every_crop = [*crops.global_crops, *crops.local_crops]
        assert all(differs(torch.stack(every_crop)))
        assert all(not torch.equal(one, other) for one, other in itertools.combinations(every_crop, 2))


@pytest.mark.usefixtures("whole_image")
def test_grey_at_probability_1_makes_the_channels_of_every_crop_equal() -> None:
    luma = (unchanged() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    for crops in crops_of_seeds(whole_image_augmentation(gray_prob=1.0)):
        for crop in (*crops.global_crops, *crops.local_crops):
            assert torch.equal(crop[0], crop[1]) and torch.equal(crop[0], crop[2])
            assert (crop[0] - luma).abs().max() < 1e-3  # the weights have four digits in torchvision


@pytest.mark.usefixtures("whole_image")
@pytest.mark.parametrize(
    ("blur", "flipped_sense"), [("intended", False), ("dinov2_released", True)], ids=["intended", "released"]
)
@pytest.mark.parametrize("probs", list(itertools.product([0.0, 1.0], repeat=3)))
def test_blur_happens_where_its_probability_is_1_and_the_reverse_in_the_released_way(
    blur: str, flipped_sense: bool, probs: tuple[float, float, float]
) -> None:
    augmentation = whole_image_augmentation(blur=blur, global_blur_probs=probs[:2], local_blur_prob=probs[2])
    expected = [(prob == 1.0) != flipped_sense for prob in probs]
    for seed in range(5):
        crops = augmentation(random_source(), np.random.default_rng(seed))
        # A sigma near its least value, 0.1, leaves the float crop as it is: look at the choice itself as well.
        choices = [recipe.draw(SIZE, np.random.default_rng(seed)) for recipe in augmentation.global_recipes]
        assert [choice.blur_sigma is not None for choice in choices] == expected[:2]
        if not expected[0]:
            assert torch.equal(crops.global_crops[0], unchanged())
        if not expected[2]:
            assert differs(crops.local_crops) == [False] * 3


@pytest.mark.usefixtures("whole_image")
def test_blur_at_probability_1_smooths_the_crops() -> None:
    all_crops = crops_of_seeds(whole_image_augmentation(global_blur_probs=(1.0, 0.0), local_blur_prob=1.0))
    # Three in four sigmas (uniform in 0.1..2) lie above 0.5, which takes away most of the variance of white noise.
    first = [crops.global_crops[0].var() < 0.5 * unchanged().var() for crops in all_crops]
    local = [crop.var() < 0.5 * unchanged().var() for crops in all_crops for crop in crops.local_crops]
    assert np.mean(first) > 0.5 and np.mean(local) > 0.6
    assert all(differs(crops.global_crops)[1] is False for crops in all_crops)


def test_default_blur_is_dinov2s_intention() -> None:
    intended = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 8)
    released = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 8, blur="dinov2_released")

    def blur_probs(augmentation: DataAugmentationDINO) -> list[float]:
        return [recipe.blur_prob for recipe in (*augmentation.global_recipes, augmentation.local_recipes[0])]

    assert blur_probs(intended) == pytest.approx([1.0, 0.1, 0.5])
    assert blur_probs(released) == pytest.approx([0.0, 0.9, 0.5])


@pytest.mark.usefixtures("whole_image")
def test_solarisation_at_probability_1_inverts_bright_pixels_of_the_second_global_crop_only() -> None:
    source = random_source().int()
    inverted = torch.where(source >= 128, 255 - source, source) / 255
    for crops in crops_of_seeds(whole_image_augmentation(solarize_prob=1.0)):
        assert (crops.global_crops[1] - inverted).abs().max() < 1e-6  # 1 - x / 255 in float32
        assert differs(crops.global_crops)[0] is False
        assert differs(crops.local_crops) == [False] * 3


def test_frequencies_follow_the_default_probabilities() -> None:
    augmentation = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 8)
    rng = np.random.default_rng(0)
    draws = [augmentation.global_recipes[1].draw((90, 120), rng) for _ in range(4000)]
    frequencies = {
        "flip": np.mean([draw.is_flipped for draw in draws]),
        "jitter": np.mean([draw.jitter is not None for draw in draws]),
        "gray": np.mean([draw.is_gray for draw in draws]),
        "blur": np.mean([draw.blur_sigma is not None for draw in draws]),
        "solarize": np.mean([draw.is_solarized for draw in draws]),
    }
    # Four standard deviations of a frequency over 4000 draws: at most 0.032.
    assert frequencies == pytest.approx(
        {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": 0.1, "solarize": 0.2}, abs=0.032
    )


def test_jitter_and_blur_strengths_fill_their_ranges_and_orders_are_all_taken() -> None:
    recipe = CropRecipe((8, 8), (0.5, 1.0), 0.5, 1.0, 0.0, 1.0, 0.0)
    rng = np.random.default_rng(0)
    draws = [recipe.draw((50, 60), rng) for _ in range(3000)]
    jitters = [draw.jitter for draw in draws if draw.jitter is not None]
    sigmas = [draw.blur_sigma for draw in draws if draw.blur_sigma is not None]
    assert len(jitters) == len(sigmas) == 3000
    for values, low, high in (
        ([jitter.brightness for jitter in jitters], 0.6, 1.4),
        ([jitter.contrast for jitter in jitters], 0.6, 1.4),
        ([jitter.saturation for jitter in jitters], 0.8, 1.2),
        ([jitter.hue for jitter in jitters], -0.1, 0.1),
        (sigmas, 0.1, 2.0),
    ):
        margin = 0.01 * (high - low)
        assert low <= min(values) < low + margin and high - margin < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.022 * (high - low))  # 4 sigma
    orders = {order: sum(jitter.order == order for jitter in jitters) for order in itertools.permutations(range(4))}
    assert min(orders.values()) > 80 and max(orders.values()) < 175  # 125 +- 11 each


def jittered(source: Tensor, jitter: ColorJitter) -> Tensor:
    size = (source.shape[1], source.shape[2])
    return make_crop(source, CropParams((0, 0, *size), False, jitter, False, None, False), size)


def test_jitter_follows_its_order() -> None:
    image = unchanged()
    steps = (
        lambda x: tvf.adjust_brightness(x, 1.3),
        lambda x: tvf.adjust_contrast(x, 0.7),
        lambda x: tvf.adjust_saturation(x, 1.2),
        lambda x: tvf.adjust_hue(x, 0.08),
    )
    for order in itertools.permutations(range(4)):
        expected = image
        for number in order:
            expected = steps[number](expected)
        assert (jittered(random_source(), ColorJitter(1.3, 0.7, 1.2, 0.08, order)) - expected).abs().max() < 2e-5


def test_parts_of_a_crop_are_applied_in_dinov2s_order() -> None:
    source = random_source(40, 50)
    jitter = ColorJitter(1.1, 0.9, 1.1, 0.05, (3, 1, 0, 2))
    params = CropParams((3, 5, 20, 25), True, jitter, True, 0.8, True)
    expected = tvf.resize(source[:, 3:23, 5:30], [12, 16], tvf.InterpolationMode.BICUBIC, antialias=True)
    expected = jittered(expected.flip(2), jitter)
    expected = gaussian_blur(tvf.rgb_to_grayscale(expected, 3), 0.8)
    expected = torch.where(expected >= 128 / 255, 1 - expected, expected)
    # OpenCV sums in another order: rounding in float32, and a value at the threshold may fall on either side of it.
    difference = (make_crop(source, params, (12, 16)) - expected).abs()
    near = (expected - 0.5).abs() < 0.005
    assert near.float().mean() < 0.2 and difference[~near].max() < 2e-5


def test_crop_is_resized_like_pillow_does_it() -> None:
    source = random_source(61, 83)
    params = CropParams((7, 9, 40, 50), False, None, False, None, False)
    pil = Image.fromarray(source.permute(1, 2, 0).numpy()).crop((9, 7, 59, 47))
    expected = np.asarray(pil.resize((20, 16), Image.Resampling.BICUBIC)).astype(int)
    crop = (make_crop(source, params, (16, 20)) * 255).round().int().permute(1, 2, 0).numpy()
    assert np.abs(crop - expected).max() <= 1  # both round to 8 bits between the two passes


@pytest.mark.parametrize("order", ["contiguous", "interleaved"])
def test_memory_layout_of_the_source_does_not_change_the_crops(order: str) -> None:
    source = random_source(40, 50)
    if order == "interleaved":
        source = source.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    augmentation = DataAugmentationDINO((0.3, 1.0), (0.05, 0.3), 2, 16, 8)
    image = Image.fromarray(source.permute(1, 2, 0).contiguous().numpy())
    of_tensor, of_image = (augmentation(kind, np.random.default_rng(5)) for kind in (source, image))
    # Two resizing kernels, equal to one level of 255; jitter and solarisation may enlarge it, and a value at the
    # threshold of the latter may fall on either side: compare the first global crop, which is never solarised.
    assert (of_tensor.global_crops[0] - of_image.global_crops[0]).abs().max() < 3 / 255


@pytest.mark.parametrize("source_size", [(60, 80), (224, 224), (300, 90)])
@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
def test_boxes_follow_torchvisions_law(source_size: tuple[int, int], scale: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    ours = np.array([draw_box(source_size, scale, rng) for _ in range(3000)], float)
    image = torch.empty(1, *source_size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array(
            [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(3000)], float
        )
    spread = theirs.std(0) + 1e-9
    # Means and standard deviations of top, left, height, width; five standard errors of a mean of 3000 (twice).
    assert (np.abs(ours.mean(0) - theirs.mean(0)) / spread).max() < 5 * math.sqrt(2 / 3000)
    assert (np.abs(ours.std(0) - theirs.std(0)) / spread).max() < 0.1


@pytest.mark.parametrize("source_size", [(1, 1), (2, 3), (7, 500), (500, 7), (33, 47)])
@pytest.mark.parametrize("scale", [(1e-6, 1e-5), (0.05, 0.32), (0.9, 1.0), (1.0, 1.0)])
def test_boxes_lie_inside_sources_of_any_shape(source_size: tuple[int, int], scale: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        top, left, height, width = draw_box(source_size, scale, rng)
        assert height >= 1 and width >= 1 and top >= 0 and left >= 0
        assert top + height <= source_size[0] and left + width <= source_size[1]


def test_boxes_reach_every_edge() -> None:
    rng = np.random.default_rng(0)
    boxes = [draw_box((10, 12), (0.3, 0.6), rng) for _ in range(2000)]
    assert min(box[0] for box in boxes) == 0 and min(box[1] for box in boxes) == 0
    assert max(box[0] + box[2] for box in boxes) == 10 and max(box[1] + box[3] for box in boxes) == 12


@pytest.mark.parametrize("source_size", [(1, 1), (5, 300), (300, 5), (16, 16)])
def test_crops_of_tiny_and_thin_sources_are_valid(source_size: tuple[int, int]) -> None:
    augmentation = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, (16, 24), 8)
    for seed in range(5):
        crops = augmentation(random_source(*source_size), np.random.default_rng(seed))
        assert crops.global_crops.shape == (2, 3, 16, 24) and crops.local_crops.shape == (2, 3, 8, 8)
        for values in (crops.global_crops, crops.local_crops):
            assert values.dtype == torch.float32 and values.is_contiguous()
            assert values.isfinite().all() and values.min() >= 0 and values.max() <= 1 + 1e-6


def test_no_local_crops_keep_their_shape() -> None:
    crops = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 0, 16, 8)(random_source(), np.random.default_rng(0))
    assert crops.local_crops.shape == (0, 3, 8, 8)


def test_crops_depend_on_the_generator_alone() -> None:
    augmentation = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 3, 16, 8)
    torch.manual_seed(0)
    first = augmentation(random_source(), np.random.default_rng(3))
    torch.manual_seed(1)
    np.random.seed(1)
    second = augmentation(random_source(), np.random.default_rng(3))
    other = augmentation(random_source(), np.random.default_rng(4))
    assert torch.equal(first.global_crops, second.global_crops) and torch.equal(first.local_crops, second.local_crops)
    assert not torch.equal(first.global_crops, other.global_crops)


def test_global_random_states_are_not_disturbed() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 3, 16, 8)(random_source(), np.random.default_rng(3))
    assert torch.equal(torch.rand(3), expected)


def test_a_changed_probability_leaves_all_other_choices() -> None:
    base = CropRecipe((8, 8), (0.3, 1.0), 0.5, 0.8, 0.2, 0.5, 0.2)
    changed = CropRecipe((8, 8), (0.3, 1.0), 0.5, 0.0, 0.2, 0.0, 0.2)
    rng, other_rng = np.random.default_rng(0), np.random.default_rng(0)
    for size in ((90, 100), (5, 400)):
        for _ in range(50):
            one, other = base.draw(size, rng), changed.draw(size, other_rng)
            assert (one.box, one.is_flipped, one.is_gray, one.is_solarized) == (
                other.box,
                other.is_flipped,
                other.is_gray,
                other.is_solarized,
            )
            assert other.jitter is None and other.blur_sigma is None


def test_source_is_not_written_to() -> None:
    source = random_source()
    before = source.clone()
    DataAugmentationDINO((1.0, 1.0), (1.0, 1.0), 2, SIZE, SIZE)(source, np.random.default_rng(0))
    assert torch.equal(source, before)


def test_least_useful_source_side_fits_the_smallest_cut_out() -> None:
    augmentation = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 8, 224, 96)
    assert augmentation.min_source_side == math.ceil(96 / math.sqrt(0.05 * 0.75))
    without_local = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 0, 224, 96)
    assert without_local.min_source_side == math.ceil(224 / math.sqrt(0.32 * 0.75))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blur": "none"}, "intended, dinov2_released; got 'none'"),
        ({"local_crops_number": -1}, "got -1"),
        ({"global_crops_scale": (0.0, 1.0)}, "0 < min"),
        ({"local_crops_scale": (0.5, 0.2)}, "0 < min"),
        ({"global_crops_size": 0}, "at least 1 x 1"),
        ({"jitter_prob": 1.5}, "jitter_prob.*1.5"),
        ({"global_blur_probs": (-0.1, 0.0)}, "blur_prob"),
    ],
)
def test_faulty_arguments_are_refused(changes: dict[str, object], message: str) -> None:
    arguments = {
        "global_crops_scale": (0.32, 1.0),
        "local_crops_scale": (0.05, 0.32),
        "local_crops_number": 2,
        "global_crops_size": 16,
        "local_crops_size": 8,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        DataAugmentationDINO(**arguments)  # type: ignore[arg-type]


def test_choices_are_those_of_every_run_before() -> None:
    """The recorded digest stands for the draws that all earlier runs were made with, to six digits."""
    augmentation = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 8)
    digest = hashlib.sha256()
    for seed in range(200):
        size = [(375, 500), (224, 224), (1000, 333), (30, 900)][seed % 4]
        choices = augmentation.draw(size, np.random.default_rng(seed))
        for params in choices.global_crops + choices.local_crops:
            strengths = () if params.jitter is None else (*dataclasses.astuple(params.jitter)[:4], *params.jitter.order)
            numbers = (*params.box, params.is_flipped, params.is_gray, params.is_solarized, params.blur_sigma or 0)
            digest.update(" ".join(f"{float(number):.6f}" for number in (*numbers, *strengths)).encode())
    assert digest.hexdigest()[:16] == "30a2bc5e38d1db7f"
