"""The decoders by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from dinov2_equi.equi.decoders.base import DecoderSettings, OneForEachImage
from dinov2_equi.equi.decoders.transformer import TransformerDecoder, default_width
from dinov2_equi.equi.decoders.upconv import UpconvDecoder


def _transformer(settings: DecoderSettings) -> nn.Module:
    if settings.shared:
        return TransformerDecoder(settings)
    single = replace(settings, num_images=1)
    return OneForEachImage((TransformerDecoder(single) for _ in range(settings.num_images)), settings.patch_size)


def _upconv(settings: DecoderSettings) -> nn.Module:
    single = {
        "equi_dim": settings.equi_dim,
        "patch_size": settings.patch_size,
        "width": settings.width,
        "num_channels": settings.num_channels,
    }
    return OneForEachImage((UpconvDecoder(**single) for _ in range(settings.num_images)), settings.patch_size)


DECODERS: dict[str, Callable[[DecoderSettings], nn.Module]] = {"transformer": _transformer, "upconv": _upconv}

DEFAULT_WIDTHS: dict[str, Callable[[int], int]] = {"transformer": default_width, "upconv": lambda backbone_dim: 256}
"""Width of each decoder for a backbone width."""


def build_decoder(name: str, settings: DecoderSettings) -> nn.Module:
    """Return the decoder called `name`.

    Raises:
        ValueError: if the name is unknown, or the sizes do not fit.
    """
    if name not in DECODERS:
        raise ValueError(f"unknown decoder {name!r}; choose one of {', '.join(DECODERS)}")
    return DECODERS[name](settings)
