"""Measure the teacher while it trains: k-NN, a quick linear probe, the equivariance probe; and keep the best."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dinov2_equi.config.schema import Config
from dinov2_equi.data.datasets.base import ImageDataset
from dinov2_equi.data.datasets.holdout import evenly_spread
from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.datasets.readable import ReadableImages
from dinov2_equi.evaluation.classification import TASKS, LabelledFeatures, TaskSettings
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.labelled import matching_labels
from dinov2_equi.evaluation.results import write_text_atomically
from dinov2_equi.evaluation.stored_features import computed_features
from dinov2_equi.logging.metrics import MetricWriter
from dinov2_equi.run.probe import run_probe
from dinov2_equi.train.build import build_probe_datasets, channel_format
from dinov2_equi.train.loop import StepHook, exported_teacher
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger(__name__)

EQUIVARIANCE = "equivariance"
CLASSIFICATION = ("knn", "linear")
QUICK_EPOCHS = 3
QUICK_LEARNING_RATES = (0.01, 0.1, 1.0)
BEST, BEST_RECORD = "best", "best.json"

Measurement = Callable[[nn.Module], dict[str, float]]
"""From a teacher's backbone, on the device it computes on, to numbers by name."""

Measurements = Mapping[str, Measurement]


@dataclass(frozen=True)
class Sets:
    """What there is to measure with; None where it is not there."""

    labelled: tuple[ImageDataset, ImageDataset] | None
    """Images to learn from and to classify."""

    probe: tuple[ImageDataset, ImageDataset] | None
    """Disjoint images for the equivariance probe."""


def evaluation_hook(
    cfg: Config, dataset: ImageDataset, holdout: ImageDataset | None, *, device: torch.device, output_dir: Path
) -> StepHook | None:
    """Return what measures the teacher, or None where nothing is asked for or can be measured.

    A measurement that fails is logged and stops nothing. Neither weights nor random state of the training are touched.

    Args:
        cfg: the configuration.
        dataset: training images.
        holdout: held-back images, where there are any.
        device: where to compute.
        output_dir: run folder.

    Raises:
        DatasetError: if `evaluation.train_dataset_path` or `val_dataset_path` is wrong.
    """
    if cfg.evaluation.eval_period_iterations == 0 or not cfg.evaluation.in_process:
        return None
    measurements = prepare_measurements(cfg, dataset, holdout, device=device)
    if not measurements:
        return None

    def measure(model: SSLMetaArch, step: int, writer: MetricWriter) -> None:
        scalars, _ = measure_all(measurements, model.teacher["backbone"], step=step, device=device)
        writer.write_evaluation(step - 1, {f"eval/{name}": value for name, value in scalars.items()})
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scalars.items())
        logger.info("after step %d: %s", step, shown)
        keep_best(cfg.evaluation.best_metric, scalars, output_dir, step)

    return measure


def prepare_measurements(
    cfg: Config, dataset: ImageDataset, holdout: ImageDataset | None, *, device: torch.device
) -> Measurements:
    """Return what can be measured of what `evaluation.tasks` asks for, by name.

    Raises:
        DatasetError: if `evaluation.train_dataset_path` or `val_dataset_path` is wrong.
    """
    return _measurements(cfg, _choose_sets(cfg, dataset, holdout), device)


def measure_all(
    measurements: Measurements, backbone: nn.Module, *, step: int, device: torch.device
) -> tuple[dict[str, float], list[str]]:
    """Return what was found of the teacher after a step with the `seconds` it took, and the names of what failed.

    What fails is logged and left out of the numbers. The caller's random state is not moved.
    """
    started = time.perf_counter()
    scalars: dict[str, float] = {}
    failed: list[str] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for name, measurement in measurements.items():
            try:
                scalars |= measurement(backbone)
            except Exception as error:  # whatever an evaluation does wrong, the training goes on
                failed.append(name)
                logger.warning("evaluation %r after step %d failed, the training goes on: %s", name, step, error)
                logger.debug("the evaluation failed here", exc_info=True)
    scalars["seconds"] = time.perf_counter() - started
    return scalars, failed


def _choose_sets(cfg: Config, dataset: ImageDataset, holdout: ImageDataset | None) -> Sets:
    settings = cfg.evaluation
    channels = channel_format(cfg)
    train = make_dataset(settings.train_dataset_path, channels) if settings.train_dataset_path else dataset
    val = make_dataset(settings.val_dataset_path, channels) if settings.val_dataset_path else holdout
    is_labelled = val is not None and train.targets is not None and val.targets is not None
    limit = settings.max_images
    return Sets(
        labelled=(_some(train, limit), _some(val, limit)) if val is not None and is_labelled else None,
        probe=None if holdout is None else build_probe_datasets(dataset, holdout),
    )


def _some(dataset: ImageDataset, max_images: int) -> ImageDataset:
    return ReadableImages(evenly_spread(dataset, max_images))


def _measurements(cfg: Config, sets: Sets, device: torch.device) -> dict[str, Measurement]:
    """Return what can be measured of what is asked for."""
    found: dict[str, Measurement] = {}
    tasks = [name for name in CLASSIFICATION if name in cfg.evaluation.tasks]
    if tasks and sets.labelled is not None:
        found["classification"] = _classification(cfg, sets.labelled, tasks, device)
    if EQUIVARIANCE in cfg.evaluation.tasks and sets.probe is not None:
        found[EQUIVARIANCE] = _equivariance(cfg, sets.probe, device)
    return found


def _classification(
    cfg: Config, sets: tuple[ImageDataset, ImageDataset], tasks: list[str], device: torch.device
) -> Measurement:
    train_labels, val_labels = matching_labels(*sets)
    has_prototypes = max(cfg.dino.loss_weight, cfg.ibot.loss_weight) > 0
    settings = TaskSettings(
        features="cls" if has_prototypes else cfg.vicreg.features,  # what the losses train
        epochs=QUICK_EPOCHS,
        learning_rates=QUICK_LEARNING_RATES,
        seed=cfg.train.seed,
        device=str(device),
    )

    def measure(backbone: nn.Module) -> dict[str, float]:
        teacher = EvalModel(
            name="teacher",
            backbone=backbone,
            patch_size=cfg.student.patch_size,
            mean=tuple(cfg.data.mean),
            std=tuple(cfg.data.std),
        )
        size, batch_size = cfg.crops.global_crops_size, cfg.evaluation.batch_size
        train, val = (
            computed_features(teacher, dataset, size=size, device=device, batch_size=batch_size) for dataset in sets
        )
        data = LabelledFeatures(train, train_labels, val, val_labels)
        return {name: TASKS[name].headline(TASKS[name].measure(data, settings)) for name in tasks}

    return measure


def _equivariance(cfg: Config, sets: tuple[ImageDataset, ImageDataset], device: torch.device) -> Measurement:
    def measure(backbone: nn.Module) -> dict[str, float]:
        probe = run_probe(cfg, before=None, after=backbone, train_set=sets[0], test_set=sets[1], device=device)
        return {"r2_rotation": probe.after.r2_pooled}

    return measure


def keep_best(metric: str, scalars: Mapping[str, float], output_dir: Path, step: int) -> None:
    """Copy the teacher that was just exported to `best/` where it is better than the one that is there.

    The record is written once the copy is whole, and earlier copies go after that: a kill leaves the old or the new.
    """
    value = scalars.get(metric, math.nan)
    if not math.isfinite(value):
        return
    folder = output_dir / BEST
    record = folder / BEST_RECORD
    if record.is_file():
        so_far = json.loads(record.read_text(encoding="utf-8"))
        if so_far["metric"] == metric and so_far["value"] >= value:
            return
    place = folder / f"step_{step:08d}"
    pending = folder / f".{place.name}.tmp"
    for leftover in (pending, place):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(exported_teacher(output_dir, step), pending)
    pending.rename(place)
    facts = {"metric": metric, "value": value, "step": step, "folder": place.name}
    write_text_atomically(record, json.dumps(facts) + "\n")
    for other in folder.iterdir():
        if other.is_dir() and other != place:
            shutil.rmtree(other)
    logger.info("best %s so far, %.3f: kept in %s", metric, value, place)
