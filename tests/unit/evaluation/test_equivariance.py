"""The whole measurement: sanity of its scores, what is encoded how often, curve, similarity, k-NN, numbers."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinov2_equi.equi.feature_split import FeatureSplit
from dinov2_equi.evaluation import equivariance as module
from dinov2_equi.evaluation.equivariance import (
    ModelScores,
    ProbeSettings,
    count_steps,
    measure_equivariance,
    scores_as_numbers,
    summarize,
)
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.knn import weighted_knn
from dinov2_equi.evaluation.model import RawPixels
from dinov2_equi.evaluation.probe_images import ProbeImages
from dinov2_equi.evaluation.results import write_results
from dinov2_equi.evaluation.transform_regression import ProbeResult

FAST = ProbeSettings(features=("both",), seeds=(0,), draws=8, epochs=20, hidden=128, fractions=(), ks=(3,))


class Brightness:
    """Multiplies an image by a half of 1 + theta, |theta| < 0.5."""

    param_names = ("brightness",)

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        return torch.rand(batch_size, 1, generator=generator) - 0.5

    def scale(self, theta: Tensor, fraction: float) -> Tensor:
        return theta * fraction

    def normalized(self, theta: Tensor) -> Tensor:
        return theta * 2

    def apply(self, images: Tensor, theta: Tensor) -> Tensor:
        return images * (1 + theta[:, :, None, None]) * 0.5


class ShuffledBrightness(Brightness):
    """Applies the parameters to other images than those that they are noted for."""

    def apply(self, images: Tensor, theta: Tensor) -> Tensor:
        order = torch.randperm(len(theta), generator=torch.Generator().manual_seed(len(theta)))
        return super().apply(images, theta[order])


class Blind(RawPixels):
    """Features that do not depend on the image."""

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        return {name: torch.ones_like(value) for name, value in super().forward_features(x).items()}


class Counting(RawPixels):
    """Raw pixels, counting the images and the passes it has seen."""

    num_images = num_passes = 0

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        self.num_images += len(x)
        self.num_passes += 1
        return super().forward_features(x)


class RedOnly(RawPixels):
    """Two channels: the first is the mean of red, the second always 1."""

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        red = x[:, :1].mean((2, 3))
        tokens = torch.cat([red, torch.ones_like(red)], dim=1)
        return {"x_norm_clstoken": tokens, "x_norm_patchtokens": tokens[:, None]}


def photos(n: int, seed: int) -> Tensor:
    return torch.rand(n, 3, 8, 12, generator=torch.Generator().manual_seed(seed)) * 0.5 + 0.25


def images(num_train: int = 40, num_test: int = 20, *, labels: bool = False) -> ProbeImages:
    both = (torch.arange(num_train) % 2, torch.arange(num_test) % 2)
    return ProbeImages(photos(num_train, 0), photos(num_test, 1), both if labels else None)


def measure(
    backbone: RawPixels,
    family: Brightness | None = None,
    data: ProbeImages | None = None,
    settings: ProbeSettings = FAST,
    split: FeatureSplit | None = None,
) -> ModelScores:
    model = EvalModel("pixels", backbone, patch_size=1, split=split)
    return measure_equivariance(model, data or images(), {"light": family or Brightness()}, settings, device="cpu")


def r2(scores: ModelScores, name: str = "both") -> float:
    return scores.families["light"].probes[name][0].r2_pooled


# ------------------------------------------------------------------------------------------------------------- sanity


def test_a_parameter_in_the_features_is_not_found() -> None:
    assert r2(measure(RawPixels(side=2))) > 0.9


def test_features_that_know_nothing_score_something() -> None:
    assert r2(measure(Blind(side=2))) <= 0.05


def test_shuffled_pairs_score_something() -> None:
    assert r2(measure(RawPixels(side=2), ShuffledBrightness())) <= 0.05


def test_each_half_is_scored_with_the_channels_of_the_other() -> None:
    settings = dataclasses.replace(FAST, features=("invariant", "equivariant"), curve_features="invariant")
    scores = measure(RedOnly(), settings=settings, split=FeatureSplit(2, 1))
    assert r2(scores, "invariant") > 0.5
    assert r2(scores, "equivariant") <= 0.05


def test_shared_images_are_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    data = images()
    with caplog.at_level(logging.WARNING):
        measure(RawPixels(2), data=data, settings=dataclasses.replace(FAST, epochs=1))
        assert not caplog.records
        shared = ProbeImages(data.train, torch.cat([data.test, data.train[:3]]))
        measure(RawPixels(2), data=shared, settings=dataclasses.replace(FAST, epochs=1))
    assert "3 of the probe's 23 test images" in caplog.text


# --------------------------------------------------------------------------------------------------------------- cost


def test_images_are_encoded_again_for_another_choice_of_features() -> None:
    backbone = Counting(side=1)
    settings = ProbeSettings(features=("cls", "patch_mean", "both"), seeds=(0, 1), draws=3, epochs=1, hidden=4)
    measure(backbone, data=images(10, 5, labels=True), settings=settings)
    assert backbone.num_images == 15 + 2 * 3 * 15  # the images once, then each copy once


def test_progress_does_not_end_at_its_total() -> None:
    backbone, data = Counting(side=1), images(10, 5)
    settings = ProbeSettings(features=("cls", "both"), seeds=(0, 1), draws=3, epochs=2, hidden=4, batch_size=4)
    model = EvalModel("pixels", backbone, patch_size=1)
    steps: list[None] = []
    families = {"a": Brightness(), "b": Brightness()}
    measure_equivariance(model, data, families, settings, device="cpu", on_step=lambda: steps.append(None))
    assert len(steps) == count_steps(model, data, settings, len(families))
    assert len(steps) == backbone.num_passes + 2 * 2 * (2 + 3) * 2  # families, seeds, probes, epochs


def test_eight_bit_images_are_measured_otherwise() -> None:
    bytes_ = ProbeImages(*((photos(n, seed) * 255).round().to(torch.uint8) for n, seed in ((12, 0), (6, 1))))
    floats = ProbeImages(bytes_.train.float() / 255, bytes_.test.float() / 255)
    results = [
        measure(RawPixels(1), data=data, settings=dataclasses.replace(FAST, epochs=1)) for data in (bytes_, floats)
    ]
    assert r2(results[0]) == r2(results[1])


# ----------------------------------------------------------------------------------------------- curve, seeds, others


def test_the_curve_does_not_end_with_all_pairs() -> None:
    settings = dataclasses.replace(FAST, seeds=(0, 1), fractions=(0.5, 0.25), epochs=2)
    scores = measure(RawPixels(1), settings=settings).families["light"]
    assert list(scores.curve) == [80, 160, 320]
    assert scores.curve[320] == [probe.r2_pooled for probe in scores.probes["both"]]
    assert all(len(values) == 2 for values in scores.curve.values())


def test_a_point_of_the_curve_is_not_the_first_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Tensor, Tensor]] = []

    def record(features: Tensor, theta: Tensor, *_: Tensor, **__: object) -> ProbeResult:
        given.append((features, theta))
        return ProbeResult(0, (0.0,), 0, len(theta), 1, 1, torch.zeros(1, 1), torch.zeros(1, 1))

    monkeypatch.setattr(module, "regression_probe", record)
    measure(RawPixels(1), settings=dataclasses.replace(FAST, draws=2, fractions=(0.5,)))
    (all_features, all_theta), (few_features, few_theta) = given
    assert (len(all_theta), len(few_theta)) == (80, 40)
    assert torch.equal(few_theta, all_theta[:40])
    assert torch.equal(few_features, all_features[:40])
    width = all_features.shape[1] // 2
    assert torch.equal(all_features[:40, :width], all_features[40:, :width])  # the same images in both draws
    assert not torch.equal(all_features[:40, width:], all_features[40:, width:])


def test_seeds_repeat_the_same_draw() -> None:
    probes = measure(RawPixels(1), settings=dataclasses.replace(FAST, seeds=(0, 1, 0), epochs=1))
    first, second, again = probes.families["light"].probes["both"]
    assert torch.equal(first.targets, again.targets)
    assert first.r2_pooled == again.r2_pooled
    assert not torch.equal(first.targets, second.targets)


def test_similarity_is_not_that_of_image_and_copy() -> None:
    """A darker copy has parallel pixels once nothing is taken off; features that never change have similarity 1."""
    model = EvalModel("pixels", RawPixels(2), patch_size=1, mean=(0.0,) * 3, std=(1.0,) * 3)
    settings = dataclasses.replace(FAST, epochs=1)
    scores = measure_equivariance(model, images(), {"light": Brightness()}, settings, device="cpu")
    assert scores.families["light"].similarity["both"][0] == pytest.approx(1.0)
    assert 0.5 < scores.different_similarity["both"] < 0.9999
    blind = measure(Blind(2), settings=settings)
    assert blind.different_similarity["both"] == pytest.approx(1.0)


def test_knn_is_not_that_of_the_labels() -> None:
    data = images(12, 6, labels=True)
    scores = measure(
        RawPixels(2), data=data, settings=dataclasses.replace(FAST, features=("cls",), curve_features="cls", epochs=1)
    )
    assert data.labels is not None
    model = EvalModel("pixels", RawPixels(2), patch_size=1)
    train, test = (model.features(part, device="cpu")["cls"] for part in (data.train, data.test))
    assert scores.knn["cls"] == weighted_knn(train, data.labels[0], test, data.labels[1], ks=(3,))
    assert set(scores.families["light"].knn["cls"][0]) == {3}


def test_transformed_copies_are_found_among_plain_images() -> None:
    """Each test image is a training image: of copies that keep their direction, the nearest neighbour is itself."""
    train = photos(8, 0)
    data = ProbeImages(train, train.clone(), (torch.arange(8), torch.arange(8)))
    model = EvalModel("pixels", RawPixels(2), patch_size=1, mean=(0.0,) * 3, std=(1.0,) * 3)
    settings = dataclasses.replace(FAST, epochs=1, ks=(1,))
    scores = measure_equivariance(model, data, {"light": Brightness()}, settings, device="cpu")
    assert scores.families["light"].knn["both"] == [{1: 1.0}]


def test_images_without_classes_have_a_knn() -> None:
    scores = measure(RawPixels(1), settings=dataclasses.replace(FAST, epochs=1))
    assert scores.knn == {}
    assert scores.families["light"].knn == {}


# -------------------------------------------------------------------------------------------------- numbers and faults


def test_numbers_cannot_be_written_or_lack_something(tmp_path: Path) -> None:
    settings = dataclasses.replace(FAST, seeds=(0, 1), fractions=(0.5,), epochs=1)
    scores = measure(RawPixels(1), data=images(labels=True), settings=settings)
    write_results(tmp_path / "r.json", scores_as_numbers(scores), task="equivariance")
    numbers = json.loads((tmp_path / "r.json").read_text())["numbers"]
    family = numbers["families"]["light"]
    pooled = family["r2"]["both"]["pooled"]
    assert len(pooled["values"]) == 2
    assert pooled["mean"] == pytest.approx(sum(pooled["values"]) / 2)
    # One output: pooled and single scores agree; 1e-6: the same sums in another order.
    assert family["r2"]["both"]["per_output"]["brightness"]["mean"] == pytest.approx(pooled["mean"], rel=1e-6)
    assert set(family["r2_by_pairs"]) == {"160", "320"}
    assert set(family["cosine"]) == {"both"}
    assert family["knn_transformed"]["both"]["3"]["mean"] <= 1
    assert set(numbers["knn"]["both"]) == {"3"}


def test_one_seed_has_a_deviation() -> None:
    assert summarize([0.5]) == {"mean": 0.5, "std": None, "values": [0.5]}
    assert summarize([0.0, 1.0])["std"] == pytest.approx(math.sqrt(0.5))
    assert math.isnan(summarize([math.nan, 1.0])["mean"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ()}, "at least one seed"),
        ({"draws": 0}, "one draw"),
        ({"epochs": 0}, "one epoch"),
        ({"curve_features": "cls"}, "'cls' is not among both"),
        ({"fractions": (0.5, 1.0)}, "between 0 and 1"),
        ({"features": ("invariant",), "curve_features": "invariant"}, "pixels has no features 'invariant'"),
    ],
)
def test_settings_that_measure_nothing_are_accepted(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(RawPixels(1), settings=dataclasses.replace(FAST, **change))  # type: ignore[arg-type]


def test_halves_that_a_backbone_lacks_stop_the_measurement() -> None:
    settings = dataclasses.replace(FAST, features=("both", "equivariant"), epochs=1)
    assert set(measure(RawPixels(1), settings=settings).families["light"].probes) == {"both"}


def test_a_single_test_image_is_accepted() -> None:
    with pytest.raises(ValueError, match="two test images, got 4 and 1"):
        measure(RawPixels(1), data=images(4, 1))
