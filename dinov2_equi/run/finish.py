"""What a run leaves for people: probe, pictures, `results.json`, `report.html`, and a small table on the console."""

from __future__ import annotations

import logging
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.table import Table

from dinov2_equi.config.load import to_yaml
from dinov2_equi.config.schema import Config
from dinov2_equi.data.datasets.base import ImageDataset
from dinov2_equi.data.transforms import eval_images
from dinov2_equi.equi.families import FamilySettings, build_family
from dinov2_equi.evaluation.features import extract_patch_tokens
from dinov2_equi.evaluation.figures import figure_array
from dinov2_equi.evaluation.pictures import pca_colors, pca_figure, reconstruction_figure
from dinov2_equi.evaluation.report import ProbeComparison, ReportData, write_report
from dinov2_equi.evaluation.results import write_results
from dinov2_equi.evaluation.transform_regression import ProbeResult, transform_regression
from dinov2_equi.layers.backend import describe_backend
from dinov2_equi.logging.console import get_console
from dinov2_equi.logging.metrics import METRICS_NAME, MetricWriter, read_metrics
from dinov2_equi.train.build import build_initial_backbone, build_probe_datasets
from dinov2_equi.train.loop import StepHook
from dinov2_equi.train.preview import Preview, make_preview
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch
from dinov2_equi.train.state import TrainState

logger = logging.getLogger(__name__)

PROBE_FAMILY = "rotation"
DRAWS_PER_IMAGE = 4
"""Transforms drawn for each probe image; one draw each would measure how the probe overfits few pairs."""
NUM_PICTURES = 5
PCA_PATCHES = 28
"""Side of the patch grid in the PCA pictures: fine enough to see objects."""


PROBE_FEATURES = "class token + mean patch token"
FILES = {
    "teacher_checkpoint.pth": "the teacher in DINOv2's layout",
    "teacher_backbone.safetensors": "its backbone alone, with the keys of the released DINOv2 weights",
    "equi_branch.safetensors": "the decoder of the equivariance branch, where there is one",
    "training_metrics.json": "every logged step, one JSON object a line",
    "results.json": "the numbers of this page",
    "config.yaml": "the resolved configuration",
    "checkpoints/": "what the same command resumes from",
}
COMMANDS = {
    "Train on your own images": "make train DATA=/path/to/images OUTPUT=runs/mine",
    "Watch the curves": ".venv/bin/tensorboard --logdir runs",
    "Classify with the features": "python eval/classification/knn.py --run RUN --train FOLDER/train --val FOLDER/val",
}


@dataclass(frozen=True)
class ProbePair:
    """The same probe on the weights before training and on the trained teacher."""

    before: ProbeResult
    after: ProbeResult


def finish_run(
    cfg: Config,
    state: TrainState,
    *,
    dataset: ImageDataset,
    holdout: ImageDataset | None,
    device: torch.device,
    output_dir: Path,
) -> None:
    """Measure and show what was learned; `logging.report` and `evaluation.probe` switch the parts off.

    Raises:
        ValueError: if the metrics file is missing or holds no step of this run.
    """
    model, metrics = state.model, _metrics_until(output_dir / METRICS_NAME, state.step)
    probe = None
    if cfg.evaluation.probe and holdout is not None:
        train_images, test_images = build_probe_datasets(dataset, holdout)
        probe = run_probe(cfg, model, train_set=train_images, test_set=test_images, device=device)
    _write_results(cfg, metrics, probe, output_dir)
    report = None
    if cfg.logging.report:
        data = _report_data(
            cfg,
            model,
            metrics=metrics,
            probe=probe,
            dataset=dataset,
            holdout=holdout,
            device=device,
            name=output_dir.name,
        )
        report = write_report(output_dir / "report.html", data)
    _print_summary(metrics, probe, report)


def _metrics_until(path: Path, step: int) -> list[dict[str, float]]:
    """Return the log of the first `step` steps: a killed run may have logged more than its checkpoint holds."""
    lines = [line for line in read_metrics(path) if line["iteration"] < step] if path.is_file() else []
    if not lines:
        raise ValueError(
            f"{path} holds no step before {step}: nothing to report. Was it moved? Train again to write it"
        )
    return lines


def run_probe(
    cfg: Config, model: SSLMetaArch, *, train_set: ImageDataset, test_set: ImageDataset, device: torch.device
) -> ProbePair:
    """Regress the rotation from frozen features of image pairs; the test images are not among the training ones.

    Both networks are given the same pairs; the untrained one has the very weights this run started from.
    """
    settings = cfg.evaluation
    size = settings.probe_size or cfg.crops.global_crops_size
    logger.info("probing the features for the rotation (%d pairs)", settings.probe_train_pairs)
    train_images = eval_images(train_set, size, max(1, settings.probe_train_pairs // DRAWS_PER_IMAGE))
    test_images = eval_images(test_set, size, max(1, settings.probe_test_pairs // DRAWS_PER_IMAGE))
    family = build_family(
        PROBE_FAMILY, FamilySettings(cfg.equi.max_rotation_deg, cfg.equi.max_translation_px, cfg.equi.fill)
    )

    def probe(backbone: torch.nn.Module) -> ProbeResult:
        return transform_regression(
            backbone,
            family,
            train_images,
            test_images,
            num_train_pairs=settings.probe_train_pairs,
            num_test_pairs=settings.probe_test_pairs,
            mean=cfg.data.mean,
            std=cfg.data.std,
            device=device,
            batch_size=settings.batch_size,
            epochs=settings.probe_epochs,
            seed=cfg.train.seed,
        )

    return ProbePair(before=probe(build_initial_backbone(cfg).to(device)), after=probe(model.teacher["backbone"]))


def picture_hook(cfg: Config, holdout: ImageDataset | None, device: torch.device) -> StepHook | None:
    """Return what draws reconstructions while training, or None where there is nothing to draw."""
    if holdout is None or cfg.logging.pictures_every_steps == 0 or cfg.equi.loss_weight == 0:
        return None

    def draw(model: SSLMetaArch, step: int, writer: MetricWriter) -> None:
        preview = make_preview(cfg, model, holdout, NUM_PICTURES, device)
        if preview is not None:
            writer.write_image(step, "reconstruction", figure_array(_reconstruction_figure(preview)))

    return draw


def _reconstruction_figure(preview: Preview) -> Figure:
    return reconstruction_figure(preview.view_1, preview.view_2, preview.targets, preview.reconstructions)


def _pca_figure(cfg: Config, model: SSLMetaArch, holdout: ImageDataset, device: torch.device) -> Figure:
    """Return held-back photographs above the patch features of the untrained and the trained network."""
    images = eval_images(holdout, PCA_PATCHES * cfg.student.patch_size, NUM_PICTURES)
    networks = {"untrained": build_initial_backbone(cfg).to(device), "trained": model.teacher["backbone"]}
    colors = {
        label: pca_colors(
            extract_patch_tokens(
                network, images, mean=cfg.data.mean, std=cfg.data.std, device=device, batch_size=NUM_PICTURES
            ),
            (PCA_PATCHES, PCA_PATCHES),
        )
        for label, network in networks.items()
    }
    return pca_figure(images, colors)


def _report_data(
    cfg: Config,
    model: SSLMetaArch,
    *,
    metrics: list[dict[str, float]],
    probe: ProbePair | None,
    dataset: ImageDataset,
    holdout: ImageDataset | None,
    device: torch.device,
    name: str,
) -> ReportData:
    preview = None if holdout is None else make_preview(cfg, model, holdout, NUM_PICTURES, device)
    last = metrics[-1]
    return ReportData(
        run_name=name,
        metrics=metrics,
        config_yaml=to_yaml(cfg),
        num_steps=int(last["iteration"]) + 1,
        duration_s=last["time/total"],
        images_per_s=_images_per_second(metrics),
        environment=_environment(device),
        peak_memory_bytes=int(last["memory_mb"] * 2**20),
        num_images=len(dataset),
        probes=[] if probe is None else [ProbeComparison(PROBE_FAMILY, PROBE_FEATURES, probe.before, probe.after)],
        reconstruction=None if preview is None else _reconstruction_figure(preview),
        pca=None if holdout is None else _pca_figure(cfg, model, holdout, device),
        files=FILES,
        commands=COMMANDS,
    )


def _environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()} | {
        "attention": describe_backend(device)
    }


def _images_per_second(metrics: list[dict[str, float]]) -> float:
    return statistics.median(line["images_per_second"] for line in metrics)


def _write_results(cfg: Config, metrics: list[dict[str, float]], probe: ProbePair | None, output_dir: Path) -> None:
    first, last = metrics[0], metrics[-1]
    numbers: dict[str, object] = {
        "loss_start": first["total_loss"],
        "loss_end": last["total_loss"],
        "steps": int(last["iteration"]) + 1,
        "seconds": last["time/total"],
        "images_per_second": _images_per_second(metrics),
        "peak_memory_mb": last["memory_mb"],
    }
    if probe is not None:
        numbers[f"r2_{PROBE_FAMILY}_untrained"] = probe.before.r2_pooled
        numbers[f"r2_{PROBE_FAMILY}_trained"] = probe.after.r2_pooled
    write_results(
        output_dir / "results.json",
        numbers,
        task="train",
        seed=cfg.train.seed,
        config_text=to_yaml(cfg),
        settings={"dataset": cfg.train.dataset_path, "equi_loss_weight": cfg.equi.loss_weight},
    )


def _print_summary(metrics: list[dict[str, float]], probe: ProbePair | None, report: Path | None) -> None:
    table = Table(title="What the run learned", show_header=True, title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row("training loss", f"{metrics[0]['total_loss']:.3f}", f"{metrics[-1]['total_loss']:.3f}")
    if probe is not None:
        table.add_row(
            f"{PROBE_FAMILY} R2 of frozen features", f"{probe.before.r2_pooled:.3f}", f"{probe.after.r2_pooled:.3f}"
        )
    console = get_console()
    console.print(table)
    if report is not None:
        console.print(f"report: {report}", soft_wrap=True, highlight=False)
