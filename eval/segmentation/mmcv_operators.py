"""A stand-in for mmcv's compiled operators, so that mmcv-lite, which has none and needs no compiler, is enough.

`mmcv.ops` looks its operators up in the module `mmcv._ext` while it is imported, and mmsegmentation imports it. Here
non-maximum suppression and RoIAlign are torchvision's, and deformable attention on a GPU is what mmcv itself takes on a
CPU. Every other operator is found, and refuses when it is called.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torchvision import ops

COMPILED = "mmcv._ext"
_MEAN_POOLING = 1


def provide_operators() -> None:
    """Put the stand-in where `mmcv.ops` looks, unless compiled operators are there; before `mmcv.ops` is imported.

    Raises:
        ImportError: mmcv is missing, or its compiled operators do not load.
    """
    try:
        importlib.import_module(COMPILED)
    except ModuleNotFoundError as error:
        if error.name != COMPILED:
            raise
        module = _Operators(COMPILED)
        module.__spec__ = ModuleSpec(COMPILED, loader=None)  # without a loader mmengine takes mmcv for the lite one
        sys.modules[COMPILED] = module


class _Operators(ModuleType):
    """The module: what it does not define is an operator that refuses."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return an operator by its name."""
        if name.startswith("__"):
            raise AttributeError(name)
        return _OPERATORS.get(name) or _missing(name)


def _missing(name: str) -> Callable[..., NoReturn]:
    def refuse(*arguments: object, **options: object) -> NoReturn:
        raise NotImplementedError(
            f"the operator {name} of mmcv is compiled, and mmcv-lite comes without it; install a compiled mmcv 2.1.0"
        )

    return refuse


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return the numbers of the boxes that are kept, int64, best first.

    Args:
        boxes: [n, 4] (left, top, right, bottom).
        scores: [n].
        iou_threshold: a box that overlaps a better one by more is dropped.
        offset: 1 where right and bottom belong to the box.
    """
    grown = boxes + boxes.new_tensor([0, 0, offset, offset])
    kept: Tensor = ops.nms(grown.float(), scores.float(), iou_threshold)
    return kept


def _roi_align_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    pool_mode: int,
    **geometry: Any,
) -> None:
    """Write the mean of the features in regions to `output`, [n, C, h, w].

    Args:
        features: [B, C, H, W].
        rois: [n, 5] (image, left, top, right, bottom).
        output: written to.
        argmax_y: of the other kind of pooling.
        argmax_x: of the other kind of pooling.
        pool_mode: the kind.
        geometry: see `_pooled`.
    """
    if pool_mode != _MEAN_POOLING:
        raise NotImplementedError("RoIAlign with max pooling needs a compiled mmcv; take pool_mode='avg'")
    output.copy_(_pooled(features, rois, **geometry))


def _roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_features: Tensor,
    *,
    pool_mode: int,
    **geometry: Any,
) -> None:
    """Write the gradient of the features to `grad_features`; arguments as of `_roi_align_forward`."""
    with torch.enable_grad():
        features = torch.zeros_like(grad_features, requires_grad=True)  # the mean is linear: any point will do
        (gradient,) = torch.autograd.grad(_pooled(features, rois, **geometry), features, grad_output)
    grad_features.copy_(gradient)


def _pooled(
    features: Tensor,
    rois: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    size = (aligned_height, aligned_width)
    pooled: Tensor = ops.roi_align(features, rois, size, spatial_scale, sampling_ratio, aligned)
    return pooled


def _deformable_attention(
    value: Tensor, shapes: Tensor, starts: Tensor, places: Tensor, weights: Tensor, *, im2col_step: int
) -> Tensor:
    """Return what multi-scale deformable attention reads, [B, q, m * d].

    Args:
        value: [B, k, m, d], the places of all maps, one map after the other.
        shapes: [l, 2] (h, w) of the maps.
        starts: [l] numbers of their first places.
        places: [B, q, m, l, p, 2] (x, y) that are read, in [0, 1].
        weights: [B, q, m, l, p] of what is read.
        im2col_step: images at a time of the compiled operator.
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    read: Tensor = multi_scale_deformable_attn_pytorch(value, shapes, places, weights)
    return read


def _deformable_attention_backward(
    value: Tensor, shapes: Tensor, starts: Tensor, *others: Tensor, im2col_step: int
) -> None:
    """Write the gradients of value, places and weights.

    Args:
        value: as of the forward operator, as are shapes, starts and im2col_step.
        shapes: see there.
        starts: see there.
        others: places, weights, the gradient of what was read, and three tensors that are written to.
        im2col_step: see there.
    """
    places, weights, grad_output, *gradients = others
    with torch.enable_grad():
        value, places, weights = (x.detach().requires_grad_() for x in (value, places, weights))
        read = _deformable_attention(value, shapes, starts, places, weights, im2col_step=im2col_step)
        found = torch.autograd.grad(read, (value, places, weights), grad_output)
    for gradient, values in zip(gradients, found, strict=True):
        gradient.copy_(values)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "nms": _nms,
    "roi_align_forward": _roi_align_forward,
    "roi_align_backward": _roi_align_backward,
    "ms_deform_attn_forward": _deformable_attention,
    "ms_deform_attn_backward": _deformable_attention_backward,
}
