"""What DINOv2 released, by the names of its own hub: backbones, and linear classifiers of ImageNet on top of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_equi.hub.backbones import NUM_REGISTERS, SIZES, build_hub_backbone
from dinov2_equi.hub.download import cached_file
from dinov2_equi.hub.equi_backbone import EquiVisionTransformer
from dinov2_equi.models.weights import load_exact, read_state_dict

RELEASED: dict[str, tuple[str, int]] = {
    f"dinov2_vit{letter}14{suffix}": (arch, num_registers)
    for letter, arch in SIZES.items()
    for suffix, num_registers in (("", 0), ("_reg", NUM_REGISTERS))
}
"""Architecture and number of registers of the released backbones."""

RELEASED_URL = "https://dl.fbaipublicfiles.com/dinov2/{name}/{name}{registers}_{part}.pth"
RELEASED_WEIGHTS = "LVD142M"
"""DINOv2's word for the weights that it released."""

NUM_CLASSES = 1000


class LinearClassifier(nn.Module):
    """A backbone and a linear layer on its class tokens and its mean patch token, as DINOv2 classifies ImageNet."""

    def __init__(self, backbone: EquiVisionTransformer, *, layers: int = 4, num_classes: int = NUM_CLASSES) -> None:
        """Put a new linear layer on a backbone.

        Args:
            backbone: gives the features.
            layers: class tokens of that many last blocks, 1 or 4.
            num_classes: width of the output.

        Raises:
            ValueError: for another number of layers.
        """
        super().__init__()
        if layers not in (1, 4):
            raise ValueError(f"expected layers 1 or 4, for which classifiers exist; got {layers}")
        self.backbone = backbone
        self.layers = layers
        self.linear_head = nn.Linear((1 + layers) * backbone.embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, num_classes] of normalised images [B, 3, H, W]."""
        outputs: Any = self.backbone.get_intermediate_layers(x, n=self.layers, return_class_token=True)
        patches = outputs[-1][0]  # [B, N, D]
        logits: Tensor = self.linear_head(torch.cat([*(cls for _, cls in outputs), patches.mean(dim=1)], dim=1))
        return logits


def released_dinov2(name: str, *, weights: str | Path | None = None, **kwargs: Any) -> EquiVisionTransformer:
    """Return a backbone that DINOv2 released, in evaluation mode.

    Its weights are downloaded into the cache of `torch.hub` at the first call, and read from there ever after.

    Args:
        name: as in DINOv2's hub, for example `dinov2_vits14` or `dinov2_vitl14_reg`.
        weights: path or address of other weights of the same model.
        **kwargs: see `build_hub_backbone`.

    Raises:
        ValueError: for an unknown name, or a file that is no such backbone.
        OSError: if the weights cannot be downloaded; says where they are looked for.
    """
    if name not in RELEASED:
        nearest = difflib.get_close_matches(name, RELEASED, n=1, cutoff=0.0)
        raise ValueError(f"no released backbone {name!r}; did you mean {nearest[0]!r}? Known: {', '.join(RELEASED)}")
    arch, num_registers = RELEASED[name]
    return build_hub_backbone(
        arch, 14, weights=weights or _released_file(name, "pretrain"), num_registers=num_registers, **kwargs
    )


def _released_file(name: str, part: str) -> Path:
    """Return a released file in the cache of `torch.hub`, under DINOv2's own name."""
    base, num_registers = name.removesuffix("_reg"), RELEASED[name][1]
    url = RELEASED_URL.format(name=base, registers=f"_reg{num_registers}" if num_registers else "", part=part)
    return cached_file(url, name=url.rsplit("/", 1)[-1])


def _backbone_entry(name: str) -> Callable[..., EquiVisionTransformer]:
    def build(
        *, pretrained: bool = True, weights: str | Path = RELEASED_WEIGHTS, **kwargs: Any
    ) -> EquiVisionTransformer:
        if weights != RELEASED_WEIGHTS:
            return released_dinov2(name, weights=weights, **kwargs)
        if pretrained:
            return released_dinov2(name, **kwargs)
        arch, num_registers = RELEASED[name]
        return build_hub_backbone(arch, 14, num_registers=num_registers, **kwargs)

    return _named(
        build, name, f"Return DINOv2's {name}. `weights` is a path or an address; pretrained=False: random weights."
    )


def _classifier_entry(name: str) -> Callable[..., LinearClassifier]:
    backbone_entry = _backbone_entry(name)

    def build(
        *, layers: int = 4, pretrained: bool = True, weights: str | Path = RELEASED_WEIGHTS, **kwargs: Any
    ) -> LinearClassifier:
        model = LinearClassifier(backbone_entry(pretrained=pretrained, weights=weights, **kwargs), layers=layers)
        if pretrained:
            part = "linear4_head" if layers == 4 else "linear_head"
            load_exact(model.linear_head, read_state_dict(_released_file(name, part)))
        return model.eval() if pretrained else model

    text = f"Return {name} with DINOv2's linear classifier of ImageNet on `layers` (1 or 4) class tokens."
    return _named(build, f"{name}_lc", text)


def _named(function: Callable[..., Any], name: str, text: str) -> Callable[..., Any]:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = text
    return function


ENTRY_POINTS: dict[str, Callable[..., nn.Module]] = {
    **{name: _backbone_entry(name) for name in RELEASED},
    **{f"{name}_lc": _classifier_entry(name) for name in RELEASED},
}
"""DINOv2's by name; `hubconf.py` offers them."""
