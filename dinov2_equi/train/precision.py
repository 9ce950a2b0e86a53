"""Number format of the matrix products."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from dinov2_equi.config.schema import Config


def computes_in_bf16(cfg: Config, device: torch.device) -> bool:
    """Return what `compute_precision.autocast` comes to: bf16 on CUDA by default, fp32 elsewhere."""
    choice = cfg.compute_precision.autocast
    return choice == "bf16" or (choice == "auto" and device.type == "cuda")


def autocast(cfg: Config, device: torch.device) -> AbstractContextManager[None]:
    """Return the context of `compute_precision.autocast`."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if computes_in_bf16(cfg, device) else nullcontext()
