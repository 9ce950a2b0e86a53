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
from dinov2_equi.evaluation.report import ProbeComparison, ReportData, write_report
from dinov2_equi.evaluation.results import write_results
from dinov2_equi.layers.backend import describe_backend
from dinov2_equi.logging.console import get_console
from dinov2_equi.logging.metrics import METRICS_NAME, read_metrics
from dinov2_equi.run.pictures import NUM_PICTURES, draw_features, draw_reconstructions
from dinov2_equi.run.probe import PROBE_FAMILY, PROBE_FEATURES, ProbePair, run_probe
from dinov2_equi.train.build import build_initial_backbone, build_probe_datasets, check_weight_files
from dinov2_equi.train.preview import make_preview
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch
from dinov2_equi.train.state import TrainState

logger = logging.getLogger(__name__)

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
    "Train on your own images": "make train DATA=/path/to/images",
    "Watch the curves": ".venv/bin/tensorboard --logdir runs",
    "Classify with the features": "python eval/classification/knn.py --run RUN --train FOLDER/train --val FOLDER/val",
}


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
    metrics = _metrics_until(output_dir / METRICS_NAME, state.step)
    before, after = _initial_backbone(cfg, device), state.model.teacher["backbone"]
    probe = None
    if cfg.evaluation.probe and holdout is not None:
        train_set, test_set = build_probe_datasets(dataset, holdout)
        probe = run_probe(cfg, before=before, after=after, train_set=train_set, test_set=test_set, device=device)
    _write_results(cfg, metrics, probe, output_dir)
    report = None
    if cfg.logging.report:
        figures = _draw(cfg, state.model, before, holdout, device)
        data = _report_data(
            cfg, metrics, probe=probe, figures=figures, num_images=len(dataset), device=device, name=output_dir.name
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


def _initial_backbone(cfg: Config, device: torch.device) -> torch.nn.Module | None:
    """Return the backbone as it was before the first step, or None where the weights it started from are gone."""
    try:
        check_weight_files(cfg)
    except ValueError as error:
        logger.warning("the features before training are left out of the report: %s", error)
        return None
    return build_initial_backbone(cfg).to(device)


@dataclass(frozen=True)
class _Figures:
    """The pictures of the report; None where there is nothing to draw."""

    reconstruction: Figure | None = None
    pca: Figure | None = None


def _draw(
    cfg: Config,
    model: SSLMetaArch,
    before: torch.nn.Module | None,
    holdout: ImageDataset | None,
    device: torch.device,
) -> _Figures:
    if holdout is None:
        return _Figures()
    preview = make_preview(cfg, model, holdout, NUM_PICTURES, device)
    networks = {} if before is None else {"before training": before}
    networks["after training"] = model.teacher["backbone"]
    return _Figures(
        reconstruction=None if preview is None else draw_reconstructions(preview),
        pca=draw_features(cfg, networks, holdout, device),
    )


def _report_data(
    cfg: Config,
    metrics: list[dict[str, float]],
    *,
    probe: ProbePair | None,
    figures: _Figures,
    num_images: int,
    device: torch.device,
    name: str,
) -> ReportData:
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
        num_images=num_images,
        probes=[] if probe is None else [_comparison(probe)],
        reconstruction=figures.reconstruction,
        pca=figures.pca,
        files=FILES,
        commands=COMMANDS,
    )


def _comparison(probe: ProbePair) -> ProbeComparison:
    return ProbeComparison(PROBE_FAMILY, PROBE_FEATURES, probe.before, probe.after, images=probe.images)


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
        numbers[f"r2_{PROBE_FAMILY}_untrained"] = None if probe.before is None else probe.before.r2_pooled
        numbers[f"r2_{PROBE_FAMILY}_trained"] = probe.after.r2_pooled
    write_results(
        output_dir / "results.json",
        numbers,
        task="train",
        seed=cfg.train.seed,
        config_text=to_yaml(cfg),
        settings={
            "dataset": cfg.train.dataset_path,
            "equi_loss_weight": cfg.equi.loss_weight,
            "probe_images": None if probe is None else probe.images,
        },
    )


def _print_summary(metrics: list[dict[str, float]], probe: ProbePair | None, report: Path | None) -> None:
    table = Table(title="What the run learned", show_header=True, title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row("training loss", f"{metrics[0]['total_loss']:.3f}", f"{metrics[-1]['total_loss']:.3f}")
    if probe is not None:
        before = "-" if probe.before is None else f"{probe.before.r2_pooled:.3f}"
        table.add_row(f"{PROBE_FAMILY} R2 of frozen features", before, f"{probe.after.r2_pooled:.3f}")
    console = get_console()
    console.print(table)
    if report is not None:
        console.print(f"report: {report}", soft_wrap=True, highlight=False)
