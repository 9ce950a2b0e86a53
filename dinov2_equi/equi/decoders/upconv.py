"""The paper's decoder: a linear layer, then up-convolutions from the patch grid to pixels."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2_equi.layers.batch_norm import BatchNorm2d

_MIN_WIDTH = 8


class UpconvDecoder(nn.Module):
    """Linear layer per token, then up-convolutions, each doubling height and width, to one image.

    The published decoder has four for patches of 16 pixels: (up-convolution, batch norm, ReLU) three times, then
    up-convolution, batch norm, sigmoid. Another patch size p takes the least number whose doublings reach p; where
    they pass it (14 pixels), the image is resampled to the size wanted.

    The batch norms keep no running statistics: a step that is refused must leave nothing behind, and the decoder is of
    no use after the training.

    Source: Wang et al. (AAAI-26), Figure 1 and section 3.2; widths and kernels are ours, as the paper gives none.
    """

    def __init__(self, *, equi_dim: int, patch_size: int, width: int = 256, num_channels: int = 3) -> None:
        """Build the decoder.

        Args:
            equi_dim: D_equi of one view.
            patch_size: p, pixels a token stands for on each side, at least 2.
            width: channels after the linear layer; halved by each up-convolution, at least 8.
            num_channels: of the image.

        Raises:
            ValueError: if `patch_size` is below 2.
        """
        super().__init__()
        if patch_size < 2:
            raise ValueError(f"expected patch_size >= 2, got {patch_size}")
        self.patch_size = patch_size
        self.input_projection = nn.Linear(2 * equi_dim, width)
        num_doublings = math.ceil(math.log2(patch_size))
        widths = [max(_MIN_WIDTH, width >> level) for level in range(num_doublings)]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise([*widths, num_channels]):
            layers.append(nn.ConvTranspose2d(width_in, width_out, kernel_size=4, stride=2, padding=1, bias=False))
            layers += [BatchNorm2d(width_out), nn.ReLU()]
        layers[-1] = nn.Sigmoid()
        self.layers = nn.Sequential(*layers)

    def forward(
        self, tokens_1: Tensor, tokens_2: Tensor, grid: tuple[int, int], cls: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """See `Decoder`; one image, [1, B, 3, H, W]. Class tokens are added to every position."""
        x = self.input_projection(torch.cat([tokens_1, tokens_2], dim=-1))  # [B, N, width]
        if cls is not None:
            x = x + self.input_projection(torch.cat(cls, dim=-1)).unsqueeze(1)
        maps = x.transpose(1, 2).unflatten(2, grid)  # [B, width, h, w]
        with _without_autocast(x.device.type):
            images: Tensor = self.layers(maps.float())  # batch norm and output in float32
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return images.unsqueeze(0)


def _without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Return a context without autocast; the meta device, on which operations are only counted, has none anyway."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type=device_type, enabled=False)
