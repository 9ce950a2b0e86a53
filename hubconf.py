"""Entry points of `torch.hub.load`; needs torch alone."""

from dinov2_equi.hub.backbones import (
    dinov2_equi_vitb14,
    dinov2_equi_vitb16,
    dinov2_equi_vitg14,
    dinov2_equi_vitg16,
    dinov2_equi_vitl14,
    dinov2_equi_vitl16,
    dinov2_equi_vits14,
    dinov2_equi_vits16,
)

__all__ = [
    "dinov2_equi_vitb14",
    "dinov2_equi_vitb16",
    "dinov2_equi_vitg14",
    "dinov2_equi_vitg16",
    "dinov2_equi_vitl14",
    "dinov2_equi_vitl16",
    "dinov2_equi_vits14",
    "dinov2_equi_vits16",
]

dependencies = ["torch"]
