"""Heads that read depth off maps of tokens: one linear layer, and DPT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2_equi.evaluation.dense.maps import BlockMap, upsample

_SHARE_OFFSET = 0.1
"""Added to every rectified logit before they are divided by their sum, so that no bin is ever quite empty."""

LINEAR, LINEAR_4, DPT = "linear", "linear4", "dpt"
HEADS = (LINEAR, LINEAR_4, DPT)


class DepthOutput(NamedTuple):
    """What a head says of the images, on the grid of the head."""

    depth: Tensor
    """[B, 1, h, w] metres."""

    shares: Tensor
    """[B, K, h, w], the share of each depth bin, summing to 1."""


class DepthBins(nn.Module):
    """Depth as the mean of evenly spaced bins.

    Args:
        num_bins: K.
        min_depth: centre of the first bin, metres.
        max_depth: centre of the last bin, metres.

    Source: the bins of Bhat et al. 2021 (AdaBins, arXiv 2011.14141) with uniform widths and a linear normalisation,
    as DINOv2 evaluates depth (Oquab et al. 2023, arXiv 2304.07193, section 7.4).
    """

    centres: Tensor

    def __init__(self, num_bins: int, min_depth: float, max_depth: float) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(min_depth, max_depth, num_bins))

    def forward(self, logits: Tensor) -> DepthOutput:
        """Return depth for logits [B, K, h, w]."""
        weights = F.relu(logits) + _SHARE_OFFSET
        shares = weights / weights.sum(dim=1, keepdim=True)  # [B, K, h, w]
        depth = torch.einsum("bkhw,k->bhw", shares, self.centres).unsqueeze(1)  # [B, 1, h, w]
        return DepthOutput(depth, shares)


class LinearDepthHead(nn.Module):
    """One linear layer on patch tokens, the class token beside each, upsampled four times.

    Args:
        widths: channels of patch tokens and class token of every block.
        bins: turns logits into depth.
        num_bins: of `bins`.
    """

    UPSAMPLE = 4

    def __init__(self, widths: Sequence[tuple[int, int]], bins: DepthBins, num_bins: int) -> None:
        super().__init__()
        self.classify = nn.Conv2d(sum(patch + cls for patch, cls in widths), num_bins, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)  # type: ignore[arg-type]
        self.bins = bins

    def forward(self, maps: Sequence[BlockMap]) -> DepthOutput:
        """Return depth on a grid four times as fine as that of the patches."""
        # A 1x1 convolution and bilinear upsampling commute: the weights of the four pixels sum to 1. Classifying
        # first is the same, and sixteen times cheaper.
        logits = self.classify(torch.cat([tokens for block in maps for tokens in _with_cls(block)], dim=1))
        size = [self.UPSAMPLE * side for side in logits.shape[-2:]]
        output: DepthOutput = self.bins(upsample(logits, size))
        return output


def _with_cls(block: BlockMap) -> tuple[Tensor, Tensor]:
    """Return patch tokens and class token, both [B, D, h, w]."""
    return block.patches, block.cls[:, :, None, None].expand(-1, -1, *block.patches.shape[-2:])


class _Reassemble(nn.Module):
    """One block's tokens as a map of another resolution: 4, 2, 1 or 1/2 times the grid of the patches."""

    def __init__(self, patch_width: int, cls_width: int, width: int, channels: int, scale: float) -> None:
        super().__init__()
        self.readout = nn.Sequential(nn.Linear(patch_width + cls_width, patch_width), nn.GELU())
        self.project = nn.Conv2d(patch_width, width, 1)
        self.resize: nn.Module = nn.Identity()
        if scale > 1:
            self.resize = nn.ConvTranspose2d(width, width, int(scale), stride=int(scale))
        elif scale < 1:
            self.resize = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.to_channels = nn.Conv2d(width, channels, 3, padding=1, bias=False)

    def forward(self, block: BlockMap) -> Tensor:
        tokens = torch.cat(_with_cls(block), dim=1).movedim(1, -1)  # [B, h, w, D + D']
        maps = self.readout(tokens).movedim(-1, 1)  # [B, D, h, w]
        resized: Tensor = self.to_channels(self.resize(self.project(maps)))
        return resized


class _ResidualConv(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.conv2(F.relu(self.conv1(F.relu(x))))
        return x + change


class _Fusion(nn.Module):
    """Adds a finer map to a coarser one and doubles the resolution."""

    def __init__(self, channels: int, *, has_skip: bool) -> None:
        super().__init__()
        self.skip = _ResidualConv(channels) if has_skip else None
        self.refine = _ResidualConv(channels)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, coarse: Tensor, fine: Tensor | None = None) -> Tensor:
        if self.skip is not None:
            assert fine is not None
            coarse = upsample(coarse, fine.shape[-2:]) + self.skip(fine)
        refined = self.refine(coarse)
        output: Tensor = self.project(upsample(refined, [2 * side for side in refined.shape[-2:]]))
        return output


class DPTDepthHead(nn.Module):
    """The dense prediction transformer's decoder on four blocks.

    Args:
        widths: channels of patch tokens and class token of the four blocks.
        bins: turns logits into depth.
        num_bins: of `bins`.
        channels: of the decoder.

    Source: Ranftl et al. 2021 (arXiv 2103.13413), with the class token projected into the patches.
    """

    SCALES = (4.0, 2.0, 1.0, 0.5)

    def __init__(
        self, widths: Sequence[tuple[int, int]], bins: DepthBins, num_bins: int, *, channels: int = 256
    ) -> None:
        super().__init__()
        assert len(widths) == len(self.SCALES)
        inner = [max(patch // 2 ** (3 - index), 8) for index, (patch, _) in enumerate(widths)]
        self.reassemble = nn.ModuleList(
            _Reassemble(patch, cls, width, channels, scale)
            for (patch, cls), width, scale in zip(widths, inner, self.SCALES, strict=True)
        )
        self.fusion = nn.ModuleList(_Fusion(channels, has_skip=index < 3) for index in range(4))
        self.output = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, num_bins, 1)
        )
        self.bins = bins

    def forward(self, maps: Sequence[BlockMap]) -> DepthOutput:
        """Return depth on a grid eight times as fine as that of the patches."""
        levels = [reassemble(block) for reassemble, block in zip(self.reassemble, maps, strict=True)]
        fused = self.fusion[3](levels[3])
        for index in (2, 1, 0):
            fused = self.fusion[index](fused, levels[index])
        output: DepthOutput = self.bins(self.output(fused))
        return output
