"""Training and measurement by mmsegmentation: the models, and mmengine's runner with our data and our steps."""

from __future__ import annotations

import argparse
import logging
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import DefaultSampler, pseudo_collate
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import Runner
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dinov2_equi.data.datasets.segmentation_sets import IGNORE, SegmentationSet
from dinov2_equi.data.signals import start_worker
from dinov2_equi.distributed.collectives import average_gradients_, wait_for_all_ranks
from dinov2_equi.distributed.env import get_rank, is_main_process, share_of_rank
from dinov2_equi.evaluation.dense.segmentation import HEADS
from dinov2_equi.evaluation.dense.training import full_identity, parameter_groups, trained_state
from dinov2_equi.evaluation.eval_model import EvalModel, check_photographs
from dinov2_equi.evaluation.step_loader import steps_of_rank
from dinov2_equi.logging.setup import setup_logging
from dinov2_equi.run.dense_task import (
    MEMORY_OF_MEASURING,
    AnyTask,
    TaskRun,
    explained_memory,
    identity_of,
    measuring,
    read_task_settings,
    write_outputs,
)
from dinov2_equi.run.launch import shown_progress
from dinov2_equi.run.load import load_eval_model
from dinov2_equi.train.stopping import StopRequest
from eval.segmentation.mask2former import mask2former_head
from eval.segmentation.mmseg_loop import (
    PositionedTrainLoop,
    SaveHook,
    StepHook,
    loss_history,
    newest_checkpoint,
    readable,
)
from eval.segmentation.mmseg_parts import GATHERED, TrainingCrops, WholeImages, sample_for_test
from eval.segmentation.mmseg_settings import MASK2FORMER, UPERNET, MmsegSettings

Split = tuple[SegmentationSet, SegmentationSet]

WORK_FOLDER, CHECKPOINTS = "mmseg", "checkpoints"
PARTS = "eval.segmentation.mmseg_parts"
"""What a config of mmsegmentation has to import."""

_QUIET = {"timer": None, "sampler_seed": None, "logger": None, "param_scheduler": None, "checkpoint": None}
"""Hooks of mmengine that ours stand in for."""


def model_config(settings: MmsegSettings, weights: str | EvalModel, num_classes: int) -> dict[str, Any]:
    """Return mmsegmentation's description of a model.

    Args:
        settings: head, frozen or not, windows.
        weights: see `EquiBackbone`.
        num_classes: C.

    Raises:
        ValueError: a single class, which mmsegmentation takes for two.
    """
    if num_classes < 2:
        raise ValueError(f"mmsegmentation needs two classes or more, got {num_classes}; take --framework torch")
    backbone = {"type": "EquiBackbone", "weights": weights, "frozen": not settings.finetune, "seed": settings.seed}
    if settings.head in (UPERNET, MASK2FORMER):
        backbone["pyramid_channels"] = settings.pyramid_channels
    else:
        backbone["num_blocks"] = HEADS[settings.head]
    known = MODELS.build(dict(backbone))  # what the other parts have to fit
    shared = {"num_classes": num_classes, "out_channels": num_classes, "ignore_index": IGNORE, "align_corners": False}
    heads = _heads(settings, known.out_channels, num_classes)
    return {
        "type": "PaddedEncoderDecoder",
        "data_preprocessor": {
            "type": "mmseg.SegDataPreProcessor",
            "mean": known.mean,
            "std": known.std,
            "size_divisor": known.size_divisor,
            "seg_pad_val": IGNORE,
        },
        "backbone": backbone,
        **{name: shared | head for name, head in heads.items()},
        "test_cfg": ConfigDict(mode="slide", crop_size=(settings.crop,) * 2, stride=(settings.stride,) * 2),
    }


def _heads(settings: MmsegSettings, widths: list[int], num_classes: int) -> dict[str, Any]:
    if settings.head == MASK2FORMER:
        return {"decode_head": mask2former_head(settings, num_classes)}
    return _upernet(settings) if settings.head == UPERNET else _linear(widths)


def _linear(widths: list[int]) -> dict[str, dict[str, Any]]:
    return {
        "decode_head": {
            "type": "BatchNormLinearHead",
            "in_channels": widths,
            "in_index": list(range(len(widths))),
            "input_transform": "resize_concat",
            "channels": sum(widths),
            "dropout_ratio": 0,
            "loss_decode": _loss(1.0),
        }
    }


def _upernet(settings: MmsegSettings) -> dict[str, dict[str, Any]]:
    width, norm = settings.pyramid_channels, {"type": "mmseg.BatchNormOverRanks"}
    heads: dict[str, dict[str, Any]] = {
        "decode_head": {
            "type": "UPerHead",
            "in_channels": [width] * 4,
            "in_index": [0, 1, 2, 3],
            "channels": settings.channels,
            "norm_cfg": norm,
            "loss_decode": _loss(1.0),
        }
    }
    if settings.auxiliary_weight:
        heads["auxiliary_head"] = {
            "type": "FCNHead",
            "in_channels": width,
            "in_index": 2,
            "channels": width,
            "num_convs": 1,
            "concat_input": False,
            "norm_cfg": norm,
            "loss_decode": _loss(settings.auxiliary_weight),
        }
    return heads


def _loss(weight: float) -> dict[str, Any]:
    return {"type": "PixelCrossEntropy", "loss_weight": weight}


def build_model(config: dict[str, Any], seed: int) -> Any:
    """Return a new model of mmsegmentation with a description; what is drawn depends on the seed alone."""
    with torch.random.fork_rng(devices=[]), _own_warnings_ignored():
        torch.manual_seed(seed)
        return MODELS.build(config)


def run_mmseg(task: AnyTask, args: argparse.Namespace) -> str:
    """Train, measure and write everything, as `train_and_measure` does; return the table as text.

    Every process of a group must call it.

    Raises:
        ValueError: a checkpoint of another training or with more in it than plain values, a loss that is not finite, or
            too little memory.
        RunStopped: on a signal, once the step is finished and saved.
    """
    settings: MmsegSettings = read_task_settings(task, args)
    train, val = task.load_data(args)
    backbone = load_eval_model(args.weights, seed=settings.seed).to(args.device)
    check_photographs(backbone)
    identity = identity_of(task, args, backbone, settings, train)
    setup_logging(args.output, get_rank())
    with torch.random.fork_rng(devices=[]), StopRequest().listening() as stop:
        with explained_memory(task.memory_advice(settings)):
            runner = _runner(args, settings, backbone, (train, val), _Training(full_identity(identity, settings), stop))
            losses = _train(runner, settings)
        with explained_memory(MEMORY_OF_MEASURING), measuring(len(val), settings, stop, args.device) as advance:
            found = _measure(runner, settings, len(val), advance)
    if is_main_process():
        run = TaskRun(backbone.name, args, settings, Predictor(runner.model), val, identity)
        write_outputs(task, run, train, found, losses)
    wait_for_all_ranks()
    return task.table(backbone.name, found)


class _Training(NamedTuple):
    identity: Mapping[str, Any]
    """What it depends on."""

    stop: StopRequest
    """Whether it shall end before its time."""


def _runner(
    args: argparse.Namespace, settings: MmsegSettings, backbone: EvalModel, data: Split, training: _Training
) -> Runner:
    """Return mmengine's runner, which goes on from the newest checkpoint.

    Args:
        args: weights, device, output and loader processes.
        settings: the recipe.
        backbone: what the weights are, on the device.
        data: images to train on and images to measure on.
        training: what it depends on, and what stops it.
    """
    config = model_config(settings, backbone, len(data[0].classes))
    model = build_model(config, settings.seed).to(args.device)
    named = config | {"backbone": config["backbone"] | {"weights": args.weights}}
    checkpoints = args.output / WORK_FOLDER / CHECKPOINTS
    step, checkpoint = newest_checkpoint(checkpoints)
    runner = Runner(
        model,
        str(checkpoints.parent),
        optim_wrapper=_optimizer(args, settings, model),
        custom_hooks=[_saving(checkpoints, settings, model, training)],
        load_from=None if checkpoint is None else str(checkpoint),
        resume=checkpoint is not None,
        randomness={"seed": settings.seed},
        default_hooks=_QUIET,
        default_scope="mmseg",
        experiment_name=uuid.uuid4().hex,  # mmengine keeps things by this name for the whole process
        log_level=logging.ERROR,
        visualizer={"type": "Visualizer", "vis_backends": []},
        cfg=Config({"custom_imports": {"imports": [PARTS]}, "model": named}),
        **_data(args, settings, data, step),
    )
    model.to(args.device)  # the runner takes the first GPU that it finds
    return runner


def _saving(folder: Path, settings: MmsegSettings, model: Any, training: _Training) -> SaveHook:
    left_out = set(model.state_dict()) - set(trained_state(model, model.backbone.network))
    return SaveHook(folder, settings.save_every, training.identity, left_out, training.stop)


def _data(args: argparse.Namespace, settings: MmsegSettings, data: Split, step: int) -> dict[str, Any]:
    """Return the runner's arguments about data, loops and measures; training begins with a step, counted from 0."""
    train, val = data
    steps, images = steps_of_rank(settings.batch_size, step, settings.steps - step), WholeImages(settings, val)
    loading: dict[str, Any] = {
        "num_workers": args.num_workers,
        "collate_fn": pseudo_collate,
        "worker_init_fn": start_worker,
    }
    return {
        "train_dataloader": DataLoader(TrainingCrops(settings, train), batch_sampler=steps, **loading),
        "train_cfg": {"type": PositionedTrainLoop, "settings": settings},
        "test_dataloader": DataLoader(images, sampler=DefaultSampler(images, shuffle=False, seed=0), **loading),
        "test_cfg": {},
        "test_evaluator": [
            {"type": "ConfusionMetric", "num_images": len(share_of_rank(len(val)))},
            {"type": "IoUMetric", "ignore_index": IGNORE, "collect_device": GATHERED},
        ],
    }


def _optimizer(args: argparse.Namespace, settings: MmsegSettings, model: Any) -> OptimWrapper:
    """Return the optimiser of the plain path; on a CUDA device in mixed precision where the settings say so.

    The gradients are averaged as there: mmengine's wrapper of the model refuses parameters that a loss does not reach.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, model.backbone.network, settings))
    clip = {"max_norm": settings.clip_grad} if settings.clip_grad > 0 else None
    if settings.amp and torch.device(args.device).type == "cuda":
        return _AveragedAmp(dtype="bfloat16", loss_scale=1.0, optimizer=optimizer, clip_grad=clip)
    return _Averaged(optimizer, clip_grad=clip)


class _Averaged(OptimWrapper):
    def backward(self, loss: Tensor, **options: Any) -> None:
        super().backward(loss, **options)
        average_gradients_(parameter for group in self.param_groups for parameter in group["params"])


class _AveragedAmp(_Averaged, AmpOptimWrapper):
    pass


def _train(runner: Runner, settings: MmsegSettings) -> list[float]:
    with shown_progress(settings.steps, images_per_step=settings.batch_size) as progress:
        runner.register_hook(StepHook(progress.update))
        with readable(runner._load_from), _own_warnings_ignored():
            runner.train()
    return loss_history(runner)


def _measure(runner: Runner, settings: MmsegSettings, num_images: int, on_image: Callable[[], None]) -> dict[str, Any]:
    """Return our measures and, under `mmseg`, those of its own metric as it rounds them, percent."""
    if len(settings.test_scales) > 1 or settings.flip_test:
        runner.model = MODELS.build({"type": "SegTTAModel", "module": runner.model})
    runner.register_hook(_ImageHook(on_image))
    with _own_warnings_ignored():
        found = runner.test()
    own = {name: float(found[name]) for name in ("mIoU", "aAcc", "mAcc")}
    return dict(found["measures"]) | {"num_images": num_images, "mmseg": own}


@contextmanager
def _own_warnings_ignored() -> Iterator[None]:
    """Keep to itself what mmsegmentation and mmdet warn of in their own code."""
    with warnings.catch_warnings():
        for message in ("``build_loss`` would be deprecated", "The shape of value will convert", "torch.meshgrid"):
            warnings.filterwarnings("ignore", message=message)
        yield


class Predictor(nn.Module):
    """A model of mmsegmentation that predicts as `SegmentationModel` does."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    @torch.no_grad()
    def predict(self, image: Tensor, settings: MmsegSettings) -> Tensor:
        """Return the classes, int64 [1, H, W] on the CPU, of an image, uint8 [3, H, W]."""
        with _own_warnings_ignored():
            (sample,) = self._model.test_step(pseudo_collate([sample_for_test(image, None, settings)]))
        classes: Tensor = sample.pred_sem_seg.data.reshape(1, *image.shape[-2:]).cpu()
        return classes


class _ImageHook(Hook):
    def __init__(self, on_image: Callable[[], None]) -> None:
        self._on_image = on_image

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._on_image()
