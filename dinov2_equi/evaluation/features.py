"""Frozen features of images: class tokens, mean patch tokens, or whole patch-token maps.

Every function here takes images as they leave the data code, float32 in [0, 1] and not normalised, and a backbone whose
`forward_features(x)` returns a dict with `x_norm_clstoken` [B, D] and `x_norm_patchtokens` [B, N, D].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dinov2_equi.data.transforms import normalize

Select = Literal["cls", "patch_mean", "both"]
"""Which tokens make a feature vector: the class token, the mean patch token, or both one after the other."""


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put `module` in evaluation mode without gradients; afterwards give each submodule back the mode it had.

    A submodule can be frozen in evaluation mode inside a training model, so the flags are restored one by one.
    """
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for submodule, was_training in modes:
            submodule.training = was_training


def extract_features(
    backbone: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    batch_size: int = 64,
    select: Select = "both",
    channels: slice | None = None,
) -> Tensor:
    """Return one frozen feature vector an image: [n, F] float32 on the CPU.

    Args:
        backbone: its weights already live on `device`; put in evaluation mode for the call and restored after it.
        images: [n, 3, H, W] float32 in [0, 1], not normalised, or an iterable of such batches (sizes may differ).
        mean: channel means taken off before the backbone.
        std: channel standard deviations divided by.
        device: where the backbone runs.
        batch_size: images in one forward pass.
        select: "cls" (F = D), "patch_mean" (F = D) or "both" (F = 2D, class token first).
        channels: keep only these token channels (of D), for example the equivariant part; None keeps all.

    Raises:
        ValueError: for an unknown `select`, images that are not [n, 3, H, W], or no image at all.
    """
    if select not in get_args(Select):
        raise ValueError(f"select must be one of {', '.join(get_args(Select))}; got {select!r}")
    features = []
    with eval_mode(backbone):
        for batch in image_pieces(images, batch_size):
            tokens = backbone.forward_features(normalize(batch.to(device), mean, std))  # type: ignore[operator]
            features.append(_select_tokens(tokens, select, channels).float().cpu())
    if not features:
        raise ValueError("expected at least one image to take features of, got none; check the data set or its filter")
    return torch.cat(features)  # [n, F]


def extract_patch_tokens(
    backbone: nn.Module,
    images: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    batch_size: int = 64,
) -> Tensor:
    """Return the normalised patch tokens of images [n, 3, H, W] in [0, 1]: [n, N, D] float32 on the CPU.

    Raises:
        ValueError: for images that are not [n, 3, H, W].
    """
    tokens = []
    with eval_mode(backbone):
        for batch in image_pieces(images, batch_size):
            output = backbone.forward_features(normalize(batch.to(device), mean, std))  # type: ignore[operator]
            tokens.append(output["x_norm_patchtokens"].float().cpu())
    return torch.cat(tokens)  # [n, N, D]


def image_pieces(images: Tensor | Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Yield non-empty pieces [b, 3, H, W], b <= batch_size, of images or of an iterable of batches.

    Raises:
        ValueError: for a batch size below 1, or images of another shape.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    groups: Iterable[Tensor] = (images,) if isinstance(images, Tensor) else images
    for group in groups:
        if group.ndim != 4:
            raise ValueError(
                f"expected images of shape [n, channels, H, W], got {list(group.shape)}; stack single images first"
            )
        yield from (piece for piece in torch.split(group, batch_size) if len(piece))


def _select_tokens(tokens: dict[str, Tensor], select: Select, channels: slice | None) -> Tensor:
    kept = slice(None) if channels is None else channels
    parts = []
    if select in ("cls", "both"):
        parts.append(tokens["x_norm_clstoken"][:, kept])  # [B, D]
    if select in ("patch_mean", "both"):
        parts.append(tokens["x_norm_patchtokens"][:, :, kept].mean(dim=1))  # [B, D]
    return torch.cat(parts, dim=1)  # [B, F]
