"""Tables and figure of an equivariance measurement, from made-up scores."""

from __future__ import annotations

import math

import torch
from rich.console import Console

from dinov2_equi.evaluation.equivariance import FamilyScores, ModelScores
from dinov2_equi.evaluation.equivariance_figure import equivariance_figure
from dinov2_equi.evaluation.equivariance_tables import cell, equivariance_tables
from dinov2_equi.evaluation.figures import figure_png
from dinov2_equi.evaluation.transform_regression import ProbeResult


def probe(r2: float) -> ProbeResult:
    return ProbeResult(r2, (r2,), r2, 8, 4, 1, torch.zeros(1, 1), torch.zeros(1, 1), ("angle",))


def scores(r2: float, *features: str, families: tuple[str, ...] = ("rotation", "perspective")) -> ModelScores:
    def family(value: float) -> FamilyScores:
        return FamilyScores(
            probes={name: [probe(value), probe(value - 0.1)] for name in features},
            curve={4: [value / 2, value / 2], 8: [value, value - 0.1]},
            similarity={name: [0.75, 0.75] for name in features},
            knn={name: [{5: 0.25}, {5: 0.75}] for name in features},
        )

    return ModelScores(
        families={name: family(r2 + index) for index, name in enumerate(families)},
        different_similarity=dict.fromkeys(features, 0.125),
        knn={name: {5: 0.625} for name in features},
    )


def printed(found: ModelScores, width: int = 80) -> dict[str, list[list[str]]]:
    """Return the words of each line of each table."""
    lines = {}
    for title, table in equivariance_tables(found, "both").items():
        console = Console(width=width, record=True, file=None)
        with console.capture() as capture:
            console.print(table)
        lines[title] = [line.split() for line in capture.get().splitlines()]
    return lines


def test_a_number_is_in_the_wrong_place() -> None:
    tables = printed(scores(0.5, "cls", "both"))
    assert [title.split(",")[0] for title in tables] == [
        "R2 of the parameters",
        "R2 by the number of training pairs",
        "Cosine similarity of image and copy; last row: of different images",
        "k-NN accuracy",
    ]
    r2, curve, cosine, knn = tables.values()
    assert r2[0] == ["cls", "both"]
    assert r2[1] == ["rotation", "0.450±0.071", "0.450±0.071"]
    assert r2[3] == ["mean", "0.950", "0.950"]
    assert curve[:2] == [["4", "8"], ["rotation", "0.250±0.000", "0.450±0.071"]]
    assert cosine[-1] == ["different", "0.125", "0.125"]
    assert knn[1] == ["plain", "0.625", "0.625"]
    assert knn[2] == ["rotation", "0.500±0.354", "0.500±0.354"]


def test_a_table_does_not_fit_a_terminal() -> None:
    found = scores(-0.5, "cls", "patch_mean", "both", "invariant", "equivariant")
    r2 = next(iter(printed(found).values()))
    assert r2[2][0] == "perspective"
    assert r2[1] == ["rotation", *["-0.550±0.071"] * 5]


def test_a_single_seed_has_a_deviation() -> None:
    assert cell([0.25]) == "0.250"


def test_images_without_classes_have_a_knn_table() -> None:
    found = scores(0.5, "both")
    assert len(equivariance_tables(ModelScores(found.families, found.different_similarity, {}), "both")) == 3


def bars(figure_axes: object) -> list[float]:
    return [patch.get_height() for patch in figure_axes.patches]  # type: ignore[attr-defined]


def test_bars_of_one_backbone_are_not_its_features() -> None:
    figure = equivariance_figure({"run": scores(0.5, "cls", "both")}, "both")
    r2, cosine, *curves = figure.axes
    assert bars(r2) == [0.45, 1.45, 0.45, 1.45]
    assert bars(cosine) == [0.75] * 4
    assert [text.get_text() for text in r2.get_legend().get_texts()] == ["class token", "class + mean patch token"]
    assert [axes.get_title(loc="left") for axes in curves] == ["rotation", "perspective"]
    assert list(curves[0].lines[0].get_xdata()) == [4, 8]
    assert figure_png(figure).startswith(b"\x89PNG")


def test_several_backbones_are_not_compared_by_the_features_that_they_share() -> None:
    models = {"ours": scores(0.5, "cls", "both", "equivariant"), "theirs": scores(0.25, "cls", "both")}
    axes = equivariance_figure(models, "both").axes
    titles = [one.get_title(loc="left") for one in axes]
    assert titles[0] == "R² of the parameters, class + mean patch token"
    assert titles[2] == "R² of the parameters, equivariant half"
    assert len(bars(axes[0])) == 4 and len(bars(axes[2])) == 2
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["ours", "theirs"]
    assert all(len(one.lines) == 2 for one in axes[4:])


def test_many_families_share_one_row() -> None:
    families = ("rotation", "translation", "se2", "color", "blur", "scale", "mixture")
    figure = equivariance_figure({"run": scores(0.1, "both", families=families)}, "both")
    assert len(figure.axes) == 2 + 7


def test_a_family_that_never_varies_breaks_the_figure() -> None:
    found = scores(math.nan, "both")
    assert figure_png(equivariance_figure({"run": found}, "both")).startswith(b"\x89PNG")
    assert any("nan" in " ".join(line) for line in next(iter(printed(found).values())))
