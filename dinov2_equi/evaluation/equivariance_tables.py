"""The numbers of an equivariance measurement as tables that fit a terminal of 80 columns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from rich.table import Table

from dinov2_equi.evaluation.equivariance import FamilyScores, ModelScores, mean_and_deviation


def equivariance_tables(scores: ModelScores, curve_features: str) -> dict[str, Table]:
    """Return tables by their titles: R2, R2 by the number of pairs, similarity and, with classes, k-NN accuracy.

    Rows are families. A value is a mean over the seeds, with the standard deviation where there are several.

    Args:
        scores: what was measured of one backbone.
        curve_features: what the numbers of pairs were compared with.
    """
    tables = {
        "R2 of the parameters, pooled over outputs": _r2_table(scores),
        f"R2 by the number of training pairs, {curve_features}": _curve_table(scores),
        "Cosine similarity of image and copy; last row: of different images": _similarity_table(scores),
    }
    if scores.knn:
        k = next(k for accuracies in scores.knn.values() for k in accuracies)
        title = f"k-NN accuracy, k = {k}; first row: plain test images, others: transformed ones"
        tables[title] = _knn_table(scores, k)
    return tables


def cell(values: Sequence[float]) -> str:
    """Return `0.812±0.004` for values over several seeds, `0.812` for one."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f}±{deviation:.3f}"


def _r2_table(scores: ModelScores) -> Table:
    def values(family: FamilyScores, name: str) -> list[float]:
        return [probe.r2_pooled for probe in family.probes[name]]

    names = _features(scores)
    table = _table(names)
    _add_families(table, scores, names, values)
    families = scores.families.values()
    means = [statistics.fmean(statistics.fmean(values(family, name)) for family in families) for name in names]
    table.add_row("mean", *(f"{mean:.3f}" for mean in means))
    return table


def _curve_table(scores: ModelScores) -> Table:
    counts = list(next(iter(scores.families.values())).curve)
    table = _table([str(count) for count in counts])
    for name, family in scores.families.items():
        table.add_row(name, *(cell(values) for values in family.curve.values()))
    return table


def _similarity_table(scores: ModelScores) -> Table:
    def values(family: FamilyScores, name: str) -> list[float]:
        return family.similarity[name]

    names = _features(scores)
    table = _table(names)
    _add_families(table, scores, names, values)
    table.add_row("different", *(f"{scores.different_similarity[name]:.3f}" for name in names))
    return table


def _knn_table(scores: ModelScores, k: int) -> Table:
    def values(family: FamilyScores, name: str) -> list[float]:
        return [accuracies[k] for accuracies in family.knn[name]]

    names = _features(scores)
    table = _table(names)
    table.add_row("plain", *(f"{scores.knn[name][k]:.3f}" for name in names))
    _add_families(table, scores, names, values)
    return table


def _features(scores: ModelScores) -> list[str]:
    return list(scores.different_similarity)


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, collapse_padding=True, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _add_families(
    table: Table, scores: ModelScores, names: Sequence[str], values: Callable[[FamilyScores, str], list[float]]
) -> None:
    for label, family in scores.families.items():
        table.add_row(label, *(cell(values(family, name)) for name in names))
