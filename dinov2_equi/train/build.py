"""Composes a run from its configuration: data, networks, optimiser, schedules."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import torch

from dinov2_equi.config.derive import Derived
from dinov2_equi.config.schema import Config
from dinov2_equi.config.validate import is_rgb
from dinov2_equi.data.augmentations import DataAugmentationDINO
from dinov2_equi.data.batch import Batch
from dinov2_equi.data.datasets import channels as channels_module
from dinov2_equi.data.datasets.base import DatasetError, ImageDataset, UnreadableImageError
from dinov2_equi.data.datasets.blocks import spread_images
from dinov2_equi.data.datasets.channels import ChannelFormat
from dinov2_equi.data.datasets.holdout import hold_back
from dinov2_equi.data.datasets.make import make_dataset
from dinov2_equi.data.datasets.readable import ReadableImages
from dinov2_equi.data.datasets.sample_photos import SamplePhotos
from dinov2_equi.data.datasets.small_photos import SmallPhotos
from dinov2_equi.data.loaders import make_train_loader
from dinov2_equi.data.masking import MaskingGenerator
from dinov2_equi.data.restarting_loader import RestartingLoader
from dinov2_equi.data.source_batch import SourceBatch
from dinov2_equi.distributed.env import get_rank, get_world_size
from dinov2_equi.equi.families.registry import FAMILIES, MIXTURE, NEED_COLOR
from dinov2_equi.fsdp.checkpoint import read_checkpoint
from dinov2_equi.models.weights import load_exact
from dinov2_equi.train import schedules
from dinov2_equi.train.acceleration import checkpoint_activations_, compile_blocks_
from dinov2_equi.train.param_groups import build_param_groups
from dinov2_equi.train.pretrained import load_pretrained
from dinov2_equi.train.sharding import plan_sharding
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch
from dinov2_equi.train.state import TrainState
from dinov2_equi.train.whole import build_without_memory, materialize_sharded_

logger = logging.getLogger(__name__)

_LOOKED_AT = 16
"""Images that are looked at before a family of colours is believed to have any."""
_LOOKED_AT_PX = 32


def select_device(cfg: Config, local_rank: int = 0) -> torch.device:
    """Return the device of `train.device`; `auto` takes a CUDA device where there is one.

    Args:
        cfg: the configuration.
        local_rank: number of this process on its machine: of its CUDA device.

    Raises:
        ValueError: if CUDA is asked for and absent, or has fewer devices than processes.
    """
    kind = cfg.train.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device=cuda, but this machine has no usable CUDA device; use train.device=auto")
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this machine has no CUDA device of its own, there are "
            f"{torch.cuda.device_count()}: start as many processes, torchrun --nproc-per-node "
            f"{torch.cuda.device_count()}"
        )
    return torch.device("cuda", local_rank) if kind == "cuda" and local_rank else torch.device(kind)


def build_datasets(cfg: Config) -> tuple[ImageDataset, ImageDataset | None]:
    """Return the training images and the held-back ones for pictures and probe (None: nothing is held back).

    The sample photographs hold back whole photographs; regions of one photograph would be no unseen images. A held-back
    image that cannot be read is replaced by the next one: what is measured at the end should not end in a fault.

    Raises:
        DatasetError: if a path or name is wrong; says what was looked for.
    """
    channels = channel_format(cfg)
    train = _make_dataset("train.dataset_path", cfg.train.dataset_path, channels)
    if cfg.data.holdout_path:
        return train, ReadableImages(_make_dataset("data.holdout_path", cfg.data.holdout_path, channels))
    if isinstance(train, SamplePhotos):
        return train, SamplePhotos(split="VAL")
    if cfg.data.holdout_fraction > 0 and len(train) > 1:
        kept, held_back = hold_back(train, cfg.data.holdout_fraction, cfg.train.seed)
        return kept, ReadableImages(held_back)
    return train, None


def check_colors(cfg: Config, dataset: ImageDataset) -> None:
    """Refuse a family that changes colours on images that have none; a few of them, evenly spread, are looked at.

    Raises:
        ValueError: names the families that can be used.
    """
    drawn = cfg.equi.mixture if cfg.equi.family == MIXTURE else [cfg.equi.family]
    if not any(name in NEED_COLOR for name in drawn):
        return
    indices = spread_images(dataset, _LOOKED_AT)
    for index in indices:
        try:
            image = dataset.load_tensor(index, _LOOKED_AT_PX)
        except UnreadableImageError:
            continue  # the training replaces it
        if not torch.equal(image, image[:1].expand_as(image)):
            return
    others = ", ".join(name for name in FAMILIES if name not in (*NEED_COLOR, MIXTURE))
    raise ValueError(
        f"equi.family {cfg.equi.family!r} needs colours, and {len(indices)} images spread over "
        f"{cfg.train.dataset_path} are all grey: choose among {others}"
    )


def build_probe_datasets(train: ImageDataset, holdout: ImageDataset) -> tuple[ImageDataset, ImageDataset]:
    """Return disjoint images to train and to test a probe on: the training and the held-back ones.

    The sample photographs show too few scenes for a probe to generalise from; `small_photos` stands in for them.
    """
    if isinstance(train, SamplePhotos):
        return SmallPhotos(split="TRAIN"), SmallPhotos(split="TEST")
    return ReadableImages(train), holdout


def channel_format(cfg: Config) -> ChannelFormat | None:
    """Return how images are read channel by channel; None where they are read as RGB."""
    return channels_module.channel_format(cfg.data.in_channels, cfg.data.value_range)


def _make_dataset(key: str, spec: str, channels: ChannelFormat | None) -> ImageDataset:
    try:
        return make_dataset(spec, channels)
    except DatasetError as error:
        raise DatasetError(f"{key}={spec}: {error}") from error


def build_loader(
    cfg: Config, derived: Derived, dataset: ImageDataset, *, start_step: int, pin_memory: bool
) -> RestartingLoader[Batch | SourceBatch]:
    """Return the batches of steps `start_step` to the last, for `loaders.on_device`."""
    return make_train_loader(
        dataset=dataset,
        augmentation=_build_augmentation(cfg),
        mask_generator=_build_mask_generator(cfg),
        mask_probability=cfg.ibot.mask_sample_probability,
        mask_ratio_min_max=_pair(cfg.ibot.mask_ratio_min_max),
        batch_size=derived.batch_size_per_process,
        num_workers=cfg.train.num_workers,
        seed=cfg.train.seed,
        start_step=start_step,
        num_steps=derived.total_steps - start_step,
        rank=get_rank(),
        world_size=get_world_size(),
        pin_memory=pin_memory,
        crop_later=cfg.data.augment_on == "device",
    )


def build_preview_batch(cfg: Config, dataset: ImageDataset, count: int) -> Batch:
    """Return one unmasked batch of `count` images, augmented as in training; the same at every call."""
    loader = make_train_loader(
        dataset=dataset,
        augmentation=_build_augmentation(cfg),
        mask_generator=_build_mask_generator(cfg),
        mask_probability=0.0,
        mask_ratio_min_max=_pair(cfg.ibot.mask_ratio_min_max),
        batch_size=count,
        num_workers=0,
        seed=cfg.train.seed,
        start_step=0,
        num_steps=1,
    )
    (batch,) = loader
    assert isinstance(batch, Batch)
    return batch


def _build_augmentation(cfg: Config) -> DataAugmentationDINO:
    crops = cfg.crops
    return DataAugmentationDINO(
        _pair(crops.global_crops_scale),
        _pair(crops.local_crops_scale),
        crops.local_crops_number,
        crops.global_crops_size,
        crops.local_crops_size,
        blur=crops.blur,
        jitter_prob=crops.color_jitter_prob,
        gray_prob=crops.gray_prob,
        solarize_prob=crops.solarize_prob,
        is_rgb=is_rgb(cfg),
    )


def _build_mask_generator(cfg: Config) -> MaskingGenerator:
    side = cfg.crops.global_crops_size // cfg.student.patch_size
    return MaskingGenerator((side, side))


def build_state(cfg: Config, derived: Derived, device: torch.device, *, resumes: bool = False) -> TrainState:
    """Return a fresh run: model with its initial weights on the device, AdamW with layer-wise decay.

    Every rank must call it; each then holds its rows of what `compute_precision` says is sharded.

    Args:
        cfg: the configuration.
        derived: what follows from it.
        device: where to compute.
        resumes: the weights will be those of a checkpoint: none are loaded, and a sharded run draws none.

    Raises:
        ValueError: if the weights to start from do not fit; see `load_initial_weights`.
    """
    plan = plan_sharding(cfg, device)
    model = build_without_memory(cfg) if plan else _with_initial_weights(cfg, resumes=resumes).to(device)
    if cfg.train.activation_checkpointing != "none":
        checkpoint_activations_(model, keep_products=cfg.train.activation_checkpointing == "selective")
    if cfg.train.compile:
        compile_blocks_(model, device)
    if plan:
        make_whole = None if resumes else functools.partial(_with_initial_weights, cfg, resumes=False)
        materialize_sharded_(model, plan, device, make_whole)
    groups = build_param_groups(
        dict(model.trainable_modules()),
        layerwise_decay=cfg.optim.layerwise_decay,
        patch_embed_lr_mult=cfg.optim.patch_embed_lr_mult,
    )
    betas = (cfg.optim.adamw_beta1, cfg.optim.adamw_beta2)
    optimizer = torch.optim.AdamW(groups, lr=derived.lr, betas=betas, fused=True)
    return TrainState(model, optimizer)


def _with_initial_weights(cfg: Config, *, resumes: bool) -> SSLMetaArch:
    model = SSLMetaArch(cfg)
    if not resumes:
        load_initial_weights(model, cfg)
    return model


def check_weight_files(cfg: Config) -> None:
    """Look for the weights to start from before anything is built.

    Raises:
        ValueError: if a file or folder is missing; names the key.
    """
    for key, path in (
        ("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS),
        ("student.pretrained_weights", cfg.student.pretrained_weights),
    ):
        if path and not Path(path).expanduser().exists():
            raise ValueError(f"{key}: there is nothing at {path}; give the path of existing weights, or leave it empty")


def load_initial_weights(model: SSLMetaArch, cfg: Config) -> None:
    """Load `MODEL.WEIGHTS` (a checkpoint folder of ours) or `student.pretrained_weights` where given.

    Raises:
        ValueError: if the weights do not match the model exactly; lists the differences.
        CheckpointError: if the checkpoint is damaged.
    """
    if cfg.MODEL.WEIGHTS:
        load_exact(model, read_checkpoint(Path(cfg.MODEL.WEIGHTS).expanduser()).tensors["model"])
    elif cfg.student.pretrained_weights:
        load_pretrained(model, cfg, Path(cfg.student.pretrained_weights).expanduser())


def build_initial_student(cfg: Config) -> torch.nn.ModuleDict:
    """Return the student as it was before the first step of this configuration; the random state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(cfg.train.seed)
        model = SSLMetaArch(cfg)
    load_initial_weights(model, cfg)
    return model.student


def build_initial_backbone(cfg: Config) -> torch.nn.Module:
    """Return the backbone of `build_initial_student`, in evaluation mode."""
    return build_initial_student(cfg)["backbone"].eval()


def build_schedules(cfg: Config, derived: Derived) -> schedules.Schedules:
    """Return learning rate, weight decay, momentum and teacher temperature for every step."""
    return schedules.build_schedules(
        lr=derived.lr,
        min_lr=cfg.optim.min_lr,
        wd=cfg.optim.weight_decay,
        wd_end=cfg.optim.weight_decay_end,
        momentum=cfg.teacher.momentum_teacher,
        final_momentum=cfg.teacher.final_momentum_teacher,
        warmup_teacher_temp=cfg.teacher.warmup_teacher_temp,
        teacher_temp=cfg.teacher.teacher_temp,
        total_steps=derived.total_steps,
        warmup_steps=derived.warmup_steps,
        freeze_last_layer_steps=derived.last_layer_freeze_steps,
        temp_warmup_steps=derived.teacher_temp_warmup_steps,
    )


def _pair(values: list[float]) -> tuple[float, float]:
    low, high = values
    return low, high
