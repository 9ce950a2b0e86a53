"""The probe finds parameters that are in the features, and none that are not."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from torch import Tensor, nn

from dinov2_equi.evaluation import transform_regression as module
from dinov2_equi.evaluation.model import RawPixels
from dinov2_equi.evaluation.transform_regression import (
    ProbeResult,
    r2_per_output,
    r2_pooled,
    regression_probe,
    transform_regression,
)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def probe(features: Tensor, theta: Tensor, num_test: int = 200, **kwargs: int) -> ProbeResult:
    split = len(features) - num_test
    settings = {"hidden": 64, "epochs": 15, "batch_size": 64, **kwargs}
    return regression_probe(features[:split], theta[:split], features[split:], theta[split:], **settings)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- scores


def test_r2_per_output_equals_scikit_learn() -> None:
    targets = random(50, 3, seed=0) * torch.tensor([1.0, 10.0, 0.1]) + 5
    predictions = targets + random(50, 3, seed=1) * torch.tensor([0.3, 20.0, 0.01])
    expected = r2_score(targets.double().numpy(), predictions.double().numpy(), multioutput="raw_values")
    np.testing.assert_allclose(r2_per_output(predictions, targets).numpy(), expected, rtol=1e-12)


def test_r2_pooled_equals_the_loop_with_one_global_mean() -> None:
    targets, predictions = random(20, 2, seed=2) + torch.tensor([0.0, 9.0]), random(20, 2, seed=3)
    numbers = [(float(p), float(t)) for p, t in zip(predictions.flatten(), targets.flatten(), strict=True)]
    mean = sum(t for _, t in numbers) / len(numbers)
    expected = 1 - sum((t - p) ** 2 for p, t in numbers) / sum((t - mean) ** 2 for _, t in numbers)
    assert r2_pooled(predictions, targets) == pytest.approx(expected, rel=1e-9)


def test_the_anchors_of_r2_are_1_and_0() -> None:
    targets = random(30, 2, seed=4)
    assert r2_pooled(targets, targets) == 1.0
    assert r2_pooled(targets.mean().expand(30, 2), targets) == pytest.approx(0.0, abs=1e-6)  # a float32 mean
    assert r2_per_output(targets.mean(dim=0).expand(30, 2), targets).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_r2_of_a_target_that_never_varies_is_nan_and_not_infinite() -> None:
    targets = torch.stack([torch.ones(5), torch.arange(5.0)], dim=1)
    per_output = r2_per_output(targets, targets)
    assert per_output[0].isnan() and per_output[1] == 1
    assert math.isnan(r2_pooled(torch.zeros(5, 1), torch.ones(5, 1)))


@pytest.mark.parametrize("function", [r2_pooled, r2_per_output])
def test_scores_refuse_shapes_that_would_broadcast(function: object) -> None:
    with pytest.raises(ValueError, match=r"\[5, 1\] and \[5, 2\]"):
        function(torch.zeros(5, 1), torch.zeros(5, 2))  # type: ignore[operator]


# -------------------------------------------------------------------------------------------------------------- probe


def test_parameters_contained_in_the_features_are_found() -> None:
    theta = (torch.rand(1000, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1) * torch.tensor([45.0, 0.01])
    noise = random(1000, 6, seed=1)
    features = torch.cat([theta * torch.tensor([1e-3, 1e4]) + 50, noise], dim=1)  # columns of unlike size
    result = probe(features, theta)
    assert result.r2_pooled > 0.95
    assert min(result.r2_per_output) > 0.95  # the small parameter as well: targets are standardised


@pytest.mark.parametrize("seed", [0, 1])
def test_features_that_know_nothing_score_nothing(seed: int) -> None:
    assert probe(random(800, 8, seed=seed), random(800, 1, seed=seed + 10)).r2_pooled <= 0.05


def test_shuffled_pairs_score_nothing() -> None:
    theta = random(800, 1, seed=5)
    features = torch.cat([theta, theta**2, random(800, 4, seed=6)], dim=1)
    assert probe(features, theta).r2_pooled > 0.9
    shuffled = theta[torch.randperm(800, generator=torch.Generator().manual_seed(7))]
    assert probe(features, shuffled).r2_pooled <= 0.05


def test_statistics_of_the_test_set_are_not_used() -> None:
    theta = random(500, 1, seed=8)
    features = torch.cat([theta, random(500, 2, seed=9)], dim=1)
    whole = probe(features, theta)
    alone = regression_probe(
        features[:300], theta[:300], features[300:310], theta[300:310], hidden=64, epochs=15, batch_size=64
    )
    # 1e-4: another batch size changes the order of float32 sums.
    torch.testing.assert_close(alone.predictions, whole.predictions[:10], atol=1e-4, rtol=0)


@pytest.mark.parametrize("wobble", [0.0, 1e-3])
def test_a_feature_constant_in_training_neither_makes_nan_nor_drowns_the_others(wobble: float) -> None:
    theta = random(300, 1, seed=10)
    constant = torch.full((300, 1), 7.0)
    constant[:250:2] += 5e-7  # one rounding step of float32
    constant[250:] += wobble
    result = probe(torch.cat([theta, constant], dim=1), theta, num_test=50)
    assert result.r2_pooled > 0.9


def test_the_same_seed_gives_the_same_result_and_leaves_the_callers_random_state() -> None:
    features, theta = random(120, 4, seed=11), random(120, 1, seed=12)
    state = torch.get_rng_state()
    first, second = (probe(features, theta, num_test=20, seed=3) for _ in range(2))
    assert torch.equal(first.predictions, second.predictions)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first.predictions, probe(features, theta, num_test=20, seed=4).predictions)


def test_the_probe_learns_when_called_without_gradients() -> None:
    theta = random(300, 1, seed=13)
    with torch.no_grad():
        assert probe(theta.repeat(1, 2), theta, num_test=50).r2_pooled > 0.9


def test_result_reports_training_score_and_mean_error() -> None:
    theta = random(300, 1, seed=14) * 30
    result = probe(torch.cat([theta, theta.sin()], dim=1), theta, num_test=50)
    errors = [abs(float(p - t)) for p, t in zip(result.predictions, result.targets, strict=True)]
    assert result.mean_absolute_errors[0] == pytest.approx(sum(errors) / 50, rel=1e-5)
    assert result.train_r2_pooled > 0.9
    assert (result.num_train_pairs, result.num_test_pairs) == (250, 50)
    assert result.r2_mean == pytest.approx(result.r2_per_output[0])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 2), (5, 1), (4, 2), (4, 1)), "train features"),
        (((4, 2), (4, 1), (0, 2), (0, 1)), "test features"),
        (((4, 2), (4, 1), (4, 3), (4, 1)), "same widths"),
        (((4, 2), (4, 1), (4, 2), (4, 2)), "same widths"),
    ],
)
def test_probe_names_shapes_that_do_not_fit(shapes: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regression_probe(*(torch.zeros(shape) for shape in shapes))


# -------------------------------------------------------------------------------------------------------------- pairs


class Brightness:
    """Multiplies an image by 1 + theta, |theta| < 0.5."""

    param_names = ("brightness",)

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        return torch.rand(batch_size, 1, generator=generator) - 0.5

    def scale(self, theta: Tensor, fraction: float) -> Tensor:
        return theta * fraction

    def apply(self, images: Tensor, theta: Tensor) -> Tensor:
        assert theta.shape == (len(images), 1)
        return images * (1 + theta[:, :, None, None]) * 0.5


class Blind(RawPixels):
    """Features that do not depend on the image."""

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        return {name: torch.ones_like(value) for name, value in super().forward_features(x).items()}


class Counting(RawPixels):
    """Raw pixels, counting the images it has seen."""

    num_seen = 0

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        self.num_seen += len(x)
        return super().forward_features(x)


def regress(backbone: nn.Module, train: Tensor, test: Tensor, **kwargs: object) -> ProbeResult:
    settings: dict[str, object] = {"num_train_pairs": 600, "num_test_pairs": 100, "hidden": 128, "epochs": 30}
    return transform_regression(
        backbone, Brightness(), train, test, mean=(0.5,) * 3, std=(0.25,) * 3, device="cpu", **(settings | kwargs)
    )  # type: ignore[arg-type]


def photos(n: int, seed: int) -> Tensor:
    return torch.rand(n, 3, 8, 12, generator=torch.Generator().manual_seed(seed)) * 0.5 + 0.25


def test_brightness_is_read_from_pixels_and_not_from_blind_features() -> None:
    seeing = regress(RawPixels(side=2), photos(20, 0), photos(10, 1))
    blind = regress(Blind(side=2), photos(20, 0), photos(10, 1))
    assert seeing.r2_pooled > 0.9
    assert blind.r2_pooled <= 0.05
    assert seeing.output_names == ("brightness",)
    assert torch.equal(seeing.targets, blind.targets)  # two backbones are asked about the same pairs


def test_pair_i_is_image_i_and_its_own_transformed_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Tensor] = {}

    def record(features: Tensor, theta: Tensor, *_: Tensor, **__: object) -> ProbeResult:
        given.update(features=features, theta=theta)
        return ProbeResult(0, (0.0,), 0, 1, 1, 1, torch.zeros(1, 1), torch.zeros(1, 1))

    monkeypatch.setattr(module, "regression_probe", record)
    images = photos(3, 2)
    regress(RawPixels(side=1), images, photos(2, 3), num_train_pairs=7, batch_size=2, select="cls")
    for i in range(7):
        source = images[i % 3]
        plain = ((source - 0.5) / 0.25).mean((1, 2))
        transformed = ((source * (1 + given["theta"][i]) * 0.5 - 0.5) / 0.25).mean((1, 2))
        # 1e-5: float32 means of 96 numbers.
        torch.testing.assert_close(given["features"][i], torch.cat([plain, transformed]), atol=1e-5, rtol=0)


def test_an_image_is_encoded_once_whatever_the_number_of_its_copies() -> None:
    backbone = Counting(side=1)
    regress(backbone, photos(4, 4), photos(2, 5), num_train_pairs=40, num_test_pairs=10, epochs=1)
    assert backbone.num_seen == (4 + 40) + (2 + 10)


def test_channels_narrow_what_the_probe_sees() -> None:
    class RedKnows(RawPixels):
        def forward_features(self, x: Tensor) -> dict[str, Tensor]:
            red = x[:, :1].mean((2, 3))
            tokens = torch.cat([red, torch.zeros_like(red)], dim=1)
            return {"x_norm_clstoken": tokens, "x_norm_patchtokens": tokens[:, None]}

    train, test = photos(20, 6), photos(10, 7)
    assert regress(RedKnows(), train, test, channels=slice(0, 1)).r2_pooled > 0.5
    assert regress(RedKnows(), train, test, channels=slice(1, 2)).r2_pooled <= 0.05


def test_images_shared_by_train_and_test_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    train = photos(4, 8)
    with caplog.at_level(logging.WARNING):
        regress(RawPixels(side=1), train, photos(3, 9), num_train_pairs=4, num_test_pairs=3, epochs=1)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        regress(RawPixels(side=1), train, torch.cat([photos(3, 9), train[:2]]), num_train_pairs=4, epochs=1)
    assert "2 of the probe's 5 test images" in caplog.text


def test_a_probe_without_pairs_or_images_is_refused() -> None:
    with pytest.raises(ValueError, match="0 test pairs"):
        regress(RawPixels(), photos(1, 0), photos(1, 1), num_test_pairs=0)
    with pytest.raises(ValueError, match="0 train images"):
        regress(RawPixels(), photos(1, 0)[:0], photos(1, 1))
