"""Any backbone by the string that names it: a run, a weight file, random weights, DINOv2's hub, timm, transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dinov2_equi.config.schema import Config
from dinov2_equi.equi.feature_split import RECORDED_BLOCK, RECORDED_DIM, FeatureSplit, split_from_record
from dinov2_equi.evaluation.eval_model import DEFAULT_IMAGE_SIZE, EvalModel, default_image_size
from dinov2_equi.evaluation.foreign import load_timm, load_transformers
from dinov2_equi.evaluation.model import RawPixels, load_backbone, random_backbone
from dinov2_equi.hub.released import released_dinov2
from dinov2_equi.models.registry import ARCHS
from dinov2_equi.models.vision_transformer import DinoVisionTransformer
from dinov2_equi.models.weights import load_exact, read_part
from dinov2_equi.train.build import build_initial_student, channel_format
from dinov2_equi.train.build_model import equi_block, equi_dim, family_settings, has_split
from dinov2_equi.train.export import BACKBONE_FILE, SPLIT, TEACHER_FILE
from dinov2_equi.train.settings import load_run_config

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
RANDOM, PIXELS = "random", "pixels"
FORMS = (
    "a run folder, a weight file, random (the weights that the run beside it started from), random:vit_small/14, "
    "hub:dinov2_vits14, timm:NAME, transformers:NAME_OR_FOLDER, pixels (16 x 16 of them, no network)"
)
"""What `load_eval_models` understands, in words."""

OWN_FORMS = (
    "a run folder, a weight file, random:RUN (the weights that it started from), random:vit_small/14, hub:dinov2_vits14"
)
"""What a tool for one backbone of DINOv2's architecture understands."""

FORMS_OF_ONE = f"{OWN_FORMS}, timm:NAME, transformers:NAME_OR_FOLDER, pixels (16 x 16 of them, no network)"
"""What `load_eval_model` understands."""

DATA_FORMS = (
    "a folder with one sub-folder a class, or a data set such as ImageNet:split=VAL:root=DIR, "
    "iNaturalist2018:split=VAL:root=DIR or torchvision:name=CIFAR10:root=DIR:split=val"
)
"""Labelled images, in words; see `make_dataset`."""


def load_eval_models(specs: Sequence[str], *, size: int | None = None, seed: int = 0) -> list[EvalModel]:
    """Return the backbones that strings name, each under a name of its own.

    `random` stands for the weights that the first run among them started from, and `pixels` are normalised as those of
    the first that reads other images than photographs. The caller's random state is not moved.

    Raises:
        ValueError: for a string of no known form, or weights that do not fit; names the string.
        OSError: if a file is missing.
        ImportError: if a library is missing that one of them needs.
    """
    first_run = next((Path(spec).expanduser() for spec in specs if is_run(spec)), None)
    models: list[EvalModel] = []
    for spec in specs:
        with torch.random.fork_rng(devices=[]):
            model = _load_start(first_run) if spec == RANDOM else load_eval_model(spec, size=size, seed=seed)
        taken = {other.name for other in models}
        models.append(replace(model, name=_unique(model.name, spec, taken)))
    return [_of_same_images(model, models) for model in models]


def _of_same_images(model: EvalModel, models: Sequence[EvalModel]) -> EvalModel:
    """Return the raw pixels of the images that the others read, and any other model as it is."""
    other = next((other for other in models if other.channels is not None), None)
    if other is None or not isinstance(model.backbone, RawPixels):
        return model
    return replace(model, mean=other.mean, std=other.std, channels=other.channels)


def _load_start(run: Path | None) -> EvalModel:
    if run is None:
        raise ValueError("random means the weights a run starts from: name a run too, or random:vit_small/14")
    return load_initial(run)


def _unique(name: str, spec: str, taken: set[str]) -> str:
    """Return the first that is free: the name, the string itself, the string with a number."""
    candidates = (name, spec, *(f"{spec} ({number})" for number in range(2, len(taken) + 3)))
    return next(candidate for candidate in candidates if candidate not in taken)


def load_eval_model(spec: str, *, size: int | None = None, seed: int = 0) -> EvalModel:
    """Return the backbone that a string names, on the CPU.

    Args:
        spec: a run folder, a weight file (`.pth` or `.safetensors`, ours or DINOv2's), `random:RUN_FOLDER`,
            `random:ARCH/PATCH`, `hub:NAME`, `timm:NAME`, `transformers:NAME_OR_FOLDER` or `pixels`.
        size: side of the images it will see, pixels; None for its own. Only timm has to know it beforehand.
        seed: of random weights.

    Raises:
        ValueError: for a string of no known form, or weights that do not fit; names the string.
        OSError: if a file is missing.
        ImportError: if a library is missing that this one needs.
    """
    kind, _, name = spec.partition(":")
    path = Path(spec).expanduser()
    if is_run(spec):
        return load_run(path)
    if path.is_file():
        return _from_file(path)
    loaders: dict[str, Callable[[], EvalModel]] = {
        RANDOM: lambda: load_initial(Path(name).expanduser()) if is_run(name) else _random_model(name, size, seed),
        "hub": lambda: _from_backbone(spec, released_dinov2(name)),
        "timm": lambda: load_timm(name, size=size),
        "transformers": lambda: load_transformers(name),
        PIXELS: lambda: EvalModel(name=PIXELS, backbone=RawPixels(), patch_size=1),
    }
    if kind in loaders:
        return loaders[kind]()
    if path.is_dir():
        raise ValueError(f"{spec} is a folder without {CONFIG_FILE}, so no run; give one of: {FORMS_OF_ONE}")
    raise ValueError(f"there is no file {spec!r}, and it names nothing else; give one of: {FORMS_OF_ONE}")


def is_run(spec: str | Path) -> bool:
    """Return whether a string is the folder of a training run."""
    return bool(str(spec)) and (Path(spec).expanduser() / CONFIG_FILE).is_file()


def load_run(folder: Path) -> EvalModel:
    """Return the teacher of a run with everything its configuration says: normalisation, size, ranges, split.

    Raises:
        OSError: if the run has no weights yet.
        ValueError: if configuration and weights do not belong together.
    """
    cfg = load_run_config(folder / CONFIG_FILE)
    return _from_config(folder.resolve().name, cfg, load_teacher(cfg, folder), _trained_split(cfg, folder))


def load_teacher(cfg: Config, folder: Path) -> DinoVisionTransformer:
    """Return the backbone of the teacher that a training exported into a folder, in evaluation mode on the CPU.

    Raises:
        OSError: if there are no weights.
        ValueError: if configuration and weights do not belong together.
    """
    return load_backbone(
        folder / BACKBONE_FILE,
        arch=cfg.student.arch,
        interpolate_offset=cfg.student.interpolate_offset,
        interpolate_antialias=cfg.student.interpolate_antialias,
    )


def load_initial(folder: Path) -> EvalModel:
    """Return a run as it was before its first step: what any training has to beat.

    Raises:
        OSError: if the run started from weights that are gone.
        ValueError: if the configuration is no valid one.
    """
    cfg = load_run_config(folder / CONFIG_FILE)
    student = dict(build_initial_student(cfg).items())
    backbone, split = student["backbone"].eval(), student.get(SPLIT)
    assert isinstance(backbone, DinoVisionTransformer)
    assert split is None or isinstance(split, FeatureSplit)
    return _from_config(f"{folder.resolve().name} before training", cfg, backbone, split)


def _trained_split(cfg: Config, folder: Path) -> FeatureSplit | None:
    """Return how the run divides the channels; None where it does not, or where the projection's weights are gone."""
    if not has_split(cfg):
        return None
    split = FeatureSplit(ARCHS[cfg.student.arch].embed_dim, equi_dim(cfg), cfg.equi.projection_dim)
    if split.projection is None:
        return split
    teacher = folder / TEACHER_FILE
    if not teacher.is_file():
        logger.warning("%s is gone, and with it the projection before the split: no halves of the features", teacher)
        return None
    load_exact(split, read_part(teacher, SPLIT), allow_unexpected=(RECORDED_DIM, RECORDED_BLOCK))
    return split


def _from_config(name: str, cfg: Config, backbone: DinoVisionTransformer, split: FeatureSplit | None) -> EvalModel:
    return EvalModel(
        name=name,
        backbone=backbone,
        patch_size=cfg.student.patch_size,
        image_size=cfg.crops.global_crops_size,
        mean=tuple(cfg.data.mean),
        std=tuple(cfg.data.std),
        split=split,
        split_block=equi_block(cfg) if split is not None else None,
        families=family_settings(cfg),
        channels=channel_format(cfg),
    )


def _from_file(path: Path) -> EvalModel:
    """Return the backbone in a weight file, with the split of its features where the file has one."""
    backbone = load_backbone(path)
    model = _from_backbone(path.name, backbone)
    record = read_part(path, SPLIT)
    if not record:
        return model
    split, block = split_from_record(record, backbone.embed_dim)
    return replace(model, split=split, split_block=block)


def _from_backbone(name: str, backbone: DinoVisionTransformer) -> EvalModel:
    """Return a backbone of which only the weights are known: normalised as DINOv2 does."""
    trained_size = backbone.patch_embed.patches_resolution[0] * backbone.patch_size
    image_size = default_image_size(trained_size, backbone.patch_size)
    return EvalModel(name=name, backbone=backbone, patch_size=backbone.patch_size, image_size=image_size)


def _random_model(name: str, size: int | None, seed: int) -> EvalModel:
    arch, _, patch = name.partition("/")
    if not patch.isdecimal() or int(patch) < 1:
        raise ValueError(f"expected random:ARCH/PATCH, such as random:vit_small/14, or a run; got random:{name}")
    patch_size = int(patch)
    img_size = default_image_size(size or DEFAULT_IMAGE_SIZE, patch_size)
    backbone = random_backbone(arch, img_size=img_size, patch_size=patch_size, seed=seed)
    return _from_backbone(f"{RANDOM}:{name}", backbone)
