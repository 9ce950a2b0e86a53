"""Segmentation of video from the mask of its first frame, by the likeness of frozen patch features.

    python eval/video/run.py --weights runs/mine random hub:dinov2_vits14 --data DAVIS
    python eval/video/run.py --weights runs/mine --dataset vip --data VIP
    python eval/video/run.py --weights hub:dinov2_vits14 --dataset folder --data FRAMES --masks first_mask.png

Nothing is trained: each patch takes the labels of the patches most like it in the frames before. Writes `results.json`,
and for each backbone the masks as PNG, an animation of each clip with the masks over the frames, and a record of each
finished clip; the same command skips those that are finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.table import Table

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.video_clips import VideoClip, choose_clips, davis_clips, folder_clips, vip_clips
from dinov2_equi.distributed.collectives import largest_of_ranks
from dinov2_equi.distributed.env import get_rank, is_main_process, share_of_rank
from dinov2_equi.evaluation.dense_features import DENSE_FEATURES, check_features
from dinov2_equi.evaluation.eval_model import EvalModel, check_photographs
from dinov2_equi.evaluation.label_propagation import PROTOCOLS, PropagationSettings
from dinov2_equi.evaluation.results import folder_name, write_results
from dinov2_equi.evaluation.video_segmentation import (
    METRICS,
    ClipRecord,
    VideoSettings,
    backbone_identity,
    measure_clip,
    summarise,
)
from dinov2_equi.logging.console import get_console
from dinov2_equi.logging.setup import setup_logging
from dinov2_equi.run import launch
from dinov2_equi.run.command import EXIT_DONE, add_device
from dinov2_equi.run.launch import shown_progress
from dinov2_equi.run.load import FORMS, load_eval_models
from dinov2_equi.run.options_file import OptionsFileParser
from dinov2_equi.train.stopping import RunStopped, StopRequest

RESULTS_FILE = "results.json"
COPIED = "copy the first mask"
DATASETS = {"davis": (480, "j_and_f"), "vip": (560, "miou"), "folder": (480, "j_and_f")}
"""Shorter side of the frames and metric of each kind of data."""

Numbers = dict[str, Any]


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = OptionsFileParser(__doc__)
    add = parser.add_argument
    add("--weights", nargs="+", required=True, metavar="WEIGHTS", help=f"one or several of: {FORMS}")
    data = parser.add_argument_group("clips").add_argument
    data("--dataset", choices=tuple(DATASETS), default="davis", help="how the data lie (default: davis)")
    data("--data", type=Path, required=True, metavar="FOLDER", help="root of DAVIS or VIP, or a folder of frames")
    data("--masks", type=Path, help="with --dataset folder: masks named as the frames, or the first frame's")
    data("--clips", nargs="+", default=[], metavar="NAME", help="only these (default: all of the validation list)")
    data("--size", type=int, nargs="+", metavar="PIXELS", help="shorter side, or height and width (480; of VIP 560)")
    data("--metric", choices=METRICS, help="default: j_and_f; of VIP miou")
    own = PropagationSettings()
    how = parser.add_argument_group("propagation").add_argument
    how("--protocol", choices=PROTOCOLS, default=own.protocol, help=f"see README (default: {own.protocol})")
    how("--top-k", type=int, default=own.top_k, help=f"patches that give a label (default: {own.top_k})")
    how("--radius", type=int, default=own.radius, help=f"within so many patches; 0: no limit (default: {own.radius})")
    how("--temperature", type=float, default=own.temperature, help=f"default: {own.temperature}")
    how("--context", type=int, default=own.context, help=f"frames looked back at (default: {own.context})")
    how("--features", choices=DENSE_FEATURES, default="patches", help="default: patches; the parts of runs alone")
    add("--batch-size", type=int, default=VideoSettings.batch_size, help="frames in one forward pass")
    add_device(parser)
    add("--output", type=Path, default=Path("video"), metavar="DIR", help="default: video")
    launch.add_arguments(parser)
    return parser


def find_clips(args: argparse.Namespace) -> list[VideoClip]:
    """Return the clips to be measured.

    Raises:
        DatasetError: for data that are not there or lie otherwise.
    """
    if (args.dataset == "folder") != (args.masks is not None):
        raise DatasetError("--dataset folder needs --masks, and --masks needs --dataset folder")
    root = args.data.expanduser()
    if args.dataset == "folder":
        clips = folder_clips(root, args.masks.expanduser())
    else:
        clips = (davis_clips if args.dataset == "davis" else vip_clips)(root)
    return choose_clips(clips, args.clips) if args.clips else clips


def video_settings(args: argparse.Namespace) -> VideoSettings:
    """Return the settings, with the defaults of the data.

    Raises:
        ValueError: for settings out of range.
    """
    size, metric = DATASETS[args.dataset]
    sides = args.size or [size]
    if len(sides) > 2:
        raise ValueError(f"--size takes the shorter side, or height and width; got {len(sides)} numbers")
    settings = VideoSettings(
        size=sides[0] if len(sides) == 1 else (sides[0], sides[1]),
        metric=args.metric or metric,
        features=args.features,
        propagation=PropagationSettings(args.top_k, args.radius, args.temperature, args.context, args.protocol),
        batch_size=args.batch_size,
    )
    settings.check()
    return settings


def as_numbers(metric: str, records: list[ClipRecord]) -> Numbers:
    """Return the numbers of one backbone: all clips together, each clip, and the same of the first mask copied."""
    numbers: Numbers = summarise(metric, [record.propagated for record in records])
    numbers["copy_first_mask"] = summarise(metric, [record.copied for record in records])
    numbers["clips"] = {
        record.name: summarise(metric, [record.propagated])
        | {
            "copy_first_mask": summarise(metric, [record.copied]),
            "num_frames": record.num_frames,
            "num_scored": record.num_scored,
        }
        for record in records
    }
    return numbers


def measure_model(
    args: argparse.Namespace,
    model: EvalModel,
    clips: list[VideoClip],
    settings: VideoSettings,
    on_frame: Callable[[], None],
) -> list[ClipRecord]:
    """Return what was found of each clip with one backbone; several processes divide the clips among them."""
    identity = backbone_identity(model)
    model.to(args.device)

    def measure(clip: VideoClip, on_frame: Callable[[], None] | None = None) -> ClipRecord:
        folder = args.output / folder_name(model.name)
        return measure_clip(model, clip, settings, folder, identity=identity, device=args.device, on_frame=on_frame)

    stopped_by = 0
    try:
        for number in share_of_rank(len(clips)):
            measure(clips[number], on_frame)
    except RunStopped as stopped:
        stopped_by = stopped.signal
    stopped_by = largest_of_ranks(stopped_by, args.device)  # as soon as all are done or stopped
    if stopped_by:
        raise RunStopped(stopped_by)
    records = [measure(clip) for clip in clips]  # all are finished
    model.to("cpu")
    return records


def load_all(args: argparse.Namespace) -> tuple[VideoSettings, list[VideoClip], list[EvalModel]]:
    """Return settings, clips and backbones.

    Raises:
        ValueError: for settings out of range, data or weights that are not there.
        OSError: for weights that cannot be read.
    """
    settings = video_settings(args)
    clips = find_clips(args)
    models = load_eval_models(args.weights)
    for model in models:
        check_photographs(model)
        check_features(model, settings.features)
    return settings, clips, models


def run(args: argparse.Namespace) -> dict[str, Numbers]:
    """Return the numbers of every backbone, after writing them to `args.output`."""
    settings, clips, models = load_all(args)
    setup_logging(args.output, get_rank())
    numbers: dict[str, Numbers] = {}
    total = len(models) * sum(len(clips[number].frames) for number in share_of_rank(len(clips)))
    with StopRequest().listening() as stop, shown_progress(total) as progress:

        def advance() -> None:
            if stop.signal:
                raise RunStopped(stop.signal)
            progress.update(progress.steps_done + 1)

        for model in models:
            numbers[model.name] = as_numbers(settings.metric, measure_model(args, model, clips, settings, advance))
            if is_main_process():
                described = launch.described(args) | {"settings": dataclasses.asdict(settings), "num_clips": len(clips)}
                write_results(args.output / RESULTS_FILE, numbers, task="video", settings=described)
    return numbers


def table_of(numbers: dict[str, Numbers], metric: str) -> Table:
    """Return the means over all clips, one line a backbone, in per cent; the first mask copied comes last."""
    columns = ("J&F", "J", "J recall", "F", "F recall") if metric == "j_and_f" else ("mIoU",)
    rows = list(numbers.items()) + [(COPIED, found["copy_first_mask"]) for found in list(numbers.values())[:1]]
    table = Table("", *columns)
    for name, found in rows:
        table.add_row(name, *(f"{100 * found[column]:.1f}" for column in columns))
    return table


def report(args: argparse.Namespace) -> int:
    """Measure, and say what was found and where it lies."""
    numbers = run(args)
    if is_main_process():
        get_console().print(table_of(numbers, video_settings(args).metric))
        print(f"Per cent. Masks and animations: {args.output}/*/masks, {args.output}/*/pictures")
        print(f"written: {args.output / RESULTS_FILE}")
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    interrupted = "stopped; the same command goes on with the frame after the last that was saved"
    return launch.run_launched(
        report, get_parser(), argv, script=Path(__file__), check=load_all, interrupted=interrupted
    )


if __name__ == "__main__":
    sys.exit(main())
