"""Backbones of other libraries as `EvalModel`: timm and transformers, imported only when one of theirs is asked for."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dinov2_equi.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from dinov2_equi.evaluation.eval_model import DEFAULT_IMAGE_SIZE, EvalModel

_FINAL_NORMS = ("layernorm", "norm")
"""How models of transformers call the norm behind their last block, where the last hidden state has passed it."""


class TimmTokens(nn.Module):
    """A timm model behind `forward_features`: class token and patch tokens as DINOv2 names them.

    Tokens are read where the model ends, before its classifier. Without a class token the mean of the patch tokens
    stands for it; a feature map [B, D, h, w] of a convolutional network is N = h * w patch tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.n_blocks = len(model.blocks) if hasattr(model, "get_intermediate_layers") else 1  # type: ignore[arg-type]

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        """Return `x_norm_clstoken` [B, D] and `x_norm_patchtokens` [B, N, D] for [B, 3, H, W]."""
        output: Tensor = self.model.forward_features(x)  # type: ignore[operator]
        is_map_last = "NHWC" in str(getattr(self.model, "output_fmt", ""))
        num_prefix = int(getattr(self.model, "num_prefix_tokens", 0))
        return _as_tokens(output, num_prefix, has_cls=num_prefix > 0, is_map_last=is_map_last)

    def get_intermediate_layers(self, x: Tensor, n: int, *, return_class_token: bool) -> list[tuple[Tensor, Tensor]]:
        """Return (patch tokens, class token) after each of the last n blocks, through the final norm."""
        assert return_class_token
        outputs = self.model.get_intermediate_layers(x, n=n, return_prefix_tokens=True, norm=True)  # type: ignore[operator]
        return [(patches, prefix[:, 0] if prefix.shape[1] else patches.mean(dim=1)) for patches, prefix in outputs]


class TransformersTokens(nn.Module):
    """A transformers vision model behind `forward_features`; see `TimmTokens`.

    Tokens are the last hidden state as the library gives it. The class token is the first of those that stand before
    the patches.
    """

    def __init__(self, model: nn.Module, patch_size: int | None) -> None:
        super().__init__()
        self.model = model
        self.patch_size = patch_size
        accepted = inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        self.norm = next((getattr(model, name) for name in _FINAL_NORMS if hasattr(model, name)), None)
        has_tokens = self.norm is not None and patch_size is not None
        self.n_blocks = int(getattr(model.config, "num_hidden_layers", 1)) if has_tokens else 1

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        """Return `x_norm_clstoken` [B, D] and `x_norm_patchtokens` [B, N, D] for [B, 3, H, W]."""
        return self._by_name(x, self.model(pixel_values=x, **self.options).last_hidden_state)

    def get_intermediate_layers(self, x: Tensor, n: int, *, return_class_token: bool) -> list[tuple[Tensor, Tensor]]:
        """Return (patch tokens, class token) after each of the last n blocks, through the final norm."""
        assert return_class_token
        assert self.norm is not None  # where n_blocks says more than one
        states = self.model(pixel_values=x, output_hidden_states=True, **self.options).hidden_states[-n:]
        tokens = [self._by_name(x, self.norm(state)) for state in states]
        return [(found["x_norm_patchtokens"], found["x_norm_clstoken"]) for found in tokens]

    def _by_name(self, x: Tensor, output: Tensor) -> dict[str, Tensor]:
        """Return the tokens in an output for images [B, 3, H, W] by DINOv2's names."""
        num_prefix = 0
        if output.dim() == 3 and self.patch_size is not None:
            num_patches = (x.shape[-2] // self.patch_size) * (x.shape[-1] // self.patch_size)
            num_prefix = max(output.shape[1] - num_patches, 0)
        return _as_tokens(output, num_prefix, has_cls=num_prefix > 0, is_map_last=False)


def load_timm(name: str, *, pretrained: bool = True, size: int | None = None) -> EvalModel:
    """Return a model of timm with the normalisation and resolution that it was trained with.

    Args:
        name: as in `timm.create_model`, for example `vit_small_patch14_dinov2` or `local-dir:FOLDER`.
        pretrained: load the published weights; False draws random ones.
        size: side of the images, pixels, where it is not the model's own.

    Raises:
        ImportError: if timm is not installed.
        ValueError: if timm does not know the name, or cannot get the weights.
    """
    timm = _import("timm")
    try:
        model = _create_timm(timm, name, pretrained=pretrained)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"timm cannot make {name!r}: {error}") from error
    settings = timm.data.resolve_model_data_config(model)
    own_size = int(settings["input_size"][-1])
    if size not in (None, own_size) and hasattr(model, "set_input_size"):
        model.set_input_size((size, size))
    return EvalModel(
        name=f"timm:{name}",
        backbone=TimmTokens(model).eval(),
        patch_size=_timm_patch_size(model),
        image_size=own_size,
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
    )


def _create_timm(timm: Any, name: str, *, pretrained: bool) -> Any:
    """Return a model of timm that takes images of any size, as dense tasks have them, where it can."""
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    except TypeError:  # an architecture without this option
        return timm.create_model(name, pretrained=pretrained, num_classes=0)


def _timm_patch_size(model: Any) -> int:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None:
        return 1  # convolutional: any size will do
    return int(patch[0] if isinstance(patch, Sequence) else patch)


def load_transformers(name: str | Path) -> EvalModel:
    """Return a vision model of transformers with the normalisation and resolution of its image processor.

    Args:
        name: of a model on the hub, or a folder that `save_pretrained` wrote. Of a model of pictures and text, such as
            CLIP, the part that sees.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if there is no such model, or it takes no images.
    """
    transformers = _import("transformers")
    try:
        model = transformers.AutoModel.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"transformers cannot load {str(name)!r}: {error}") from error
    vision = getattr(model, "vision_model", model)
    if "pixel_values" not in inspect.signature(vision.forward).parameters:
        raise ValueError(f"expected {name} to be a vision model, got {type(vision).__name__}, which takes no images")
    vision.float()  # some are published in half precision, and loaded as they are
    patch_size = _first(getattr(vision.config, "patch_size", None))
    processor = _image_processor(str(name))
    own_size = _first(getattr(vision.config, "image_size", None)) or DEFAULT_IMAGE_SIZE
    return EvalModel(
        name=f"transformers:{name}",
        backbone=TransformersTokens(vision, patch_size).eval(),
        patch_size=patch_size or 1,
        image_size=_processor_size(processor) or own_size,
        mean=tuple(processor.get("image_mean") or IMAGENET_MEAN),
        std=tuple(processor.get("image_std") or IMAGENET_STD),
    )


def _image_processor(name: str) -> dict[str, Any]:
    """Return the settings of the model's image processor; empty where it was published without."""
    mixin = importlib.import_module("transformers.image_processing_base").ImageProcessingMixin
    try:
        settings, _ = mixin.get_image_processor_dict(name)
    except OSError:
        return {}
    return dict(settings)


def _processor_size(settings: dict[str, Any]) -> int | None:
    """Return the side of the crop that an image processor makes, pixels, where it is a square."""
    crop = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    if isinstance(crop, dict):
        crop = crop.get("height") or crop.get("shortest_edge")
    return crop if isinstance(crop, int) else None


def _first(value: Any) -> int | None:
    """Return a size that is written as one number or as one for each side."""
    if isinstance(value, Sequence):
        return int(value[0])
    return value if isinstance(value, int) else None


def _as_tokens(output: Tensor, num_prefix: int, *, has_cls: bool, is_map_last: bool) -> dict[str, Tensor]:
    """Return the tokens in [B, T, D], or in a map [B, D, h, w] or [B, h, w, D], by DINOv2's names."""
    if output.dim() == 4:
        patches = output.flatten(1, 2) if is_map_last else output.flatten(2).transpose(1, 2)  # [B, N, D]
        return {"x_norm_clstoken": patches.mean(dim=1), "x_norm_patchtokens": patches}
    if output.dim() != 3:
        raise ValueError(f"expected tokens [B, T, D] or a feature map [B, D, h, w], got {list(output.shape)}")
    patches = output[:, num_prefix:]  # [B, N, D]
    cls = output[:, 0] if has_cls else patches.mean(dim=1)  # [B, D]
    return {"x_norm_clstoken": cls, "x_norm_patchtokens": patches}


def _import(package: str) -> Any:
    """Return an optional package.

    Raises:
        ImportError: says what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"this backbone needs the package {package}: pip install {package} ({error})") from error
