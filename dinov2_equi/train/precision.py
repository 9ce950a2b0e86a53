"""Number format of the matrix products."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from dinov2_equi.config.schema import Config


def autocast(cfg: Config, device: torch.device) -> AbstractContextManager[None]:
    """Return the context of `compute_precision.autocast`: bf16 on CUDA by default, fp32 elsewhere."""
    choice = cfg.compute_precision.autocast
    if choice == "bf16" or (choice == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
