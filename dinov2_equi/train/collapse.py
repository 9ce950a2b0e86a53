"""Signs that the features stop telling images apart, and one warning for each."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

logger = logging.getLogger(__name__)

LOWEST_STD = 0.05
"""Of `collapse/cls_std` and `collapse/patch_std`, which are 1 where features point in all directions."""
LOWEST_INFORMATION = 0.005
"""Of `collapse/prototype_information`, a share of what as many images could tell."""
LOWEST_SPREAD = 1e-3
"""Of `collapse/spread`. Batches of thousands of images still differ by some thousandths."""
IN_A_ROW = 3
"""Diagnoses that must agree before anybody is warned."""
WINDOW = 50
"""Steps over which the spread of the loss is taken."""

_CROPS_OF_AN_IMAGE = 2
_RISE = 1.05
"""Over the highest of the diagnoses before: what rises by this factor is no collapse, however low it still is."""

SPREAD = "collapse/spread"
_WATCHED_LOSSES = ("dino_global_crops_loss", "ibot_loss", "total_loss")

_TO_TRY = (
    "lower optim.base_lr or lengthen optim.warmup_epochs, raise teacher.momentum_teacher, lower teacher.teacher_temp, "
    "train.centering=sinkhorn_knopp; with VICReg alone: raise vicreg.variance_weight"
)
SIGNS: Mapping[str, tuple[float, str]] = {
    "collapse/cls_std": (
        LOWEST_STD,
        f"the class tokens of all images are nearly the same. To try: dino.koleo_loss_weight=0.1, {_TO_TRY}",
    ),
    "collapse/patch_std": (LOWEST_STD, f"all patch tokens are nearly the same. To try: {_TO_TRY}"),
    "collapse/prototype_information": (
        LOWEST_INFORMATION,
        f"the teacher assigns all images alike, to one prototype or to all of them. To try: {_TO_TRY}",
    ),
    SPREAD: (
        LOWEST_SPREAD,
        "the loss is flat: nothing is learned. To try: look at grad_norm/* (all 0?) and at the learning rate, another "
        f"train.seed; or {_TO_TRY}",
    ),
}
"""Figures with the least value that is not a sign of collapse, and what is said below it."""


@torch.no_grad()
def collapse_metrics(cls: Tensor, patches: Tensor, assignments: Tensor | None) -> dict[str, Tensor]:
    """Return how far the features tell images apart: float32 scalars, of the images of this rank.

    * `collapse/cls_std`, `collapse/patch_std`: standard deviation of the channels of L2-normalised tokens, times
      sqrt(D): 0 where all are the same, 1 where they point in all directions;
    * `collapse/prototype_entropy`: entropy of the mean assignment over log(K): 0 where one prototype takes all;
    * `collapse/prototype_information`: what an assignment tells of the image (mean KL divergence from the mean
      assignment) over log(min(R, K)): 0 where all images have the same, be it one prototype or all of them.

    Args:
        cls: [R, D] class tokens, two of each image. Those of a single image tell nothing of images: of it only
            `collapse/patch_std` is returned.
        patches: [..., D] patch tokens.
        assignments: [R, K] probabilities, or None without prototypes.

    Source: Chen and He, "Exploring simple Siamese representation learning", 2021, section 4.1, for the deviation.
    """
    metrics = {"collapse/patch_std": _relative_std(patches.flatten(0, -2))}
    if len(cls) <= _CROPS_OF_AN_IMAGE:
        return metrics
    metrics["collapse/cls_std"] = _relative_std(cls)
    if assignments is None:
        return metrics
    rows = assignments.float()
    R, K = rows.shape
    of_mean = torch.special.entr(rows.mean(dim=0)).sum()
    information = of_mean - torch.special.entr(rows).sum(dim=1).mean()
    return metrics | {
        "collapse/prototype_entropy": of_mean / math.log(K) if K > 1 else of_mean,
        "collapse/prototype_information": information.clamp_min(0.0) / max(math.log(min(R, K)), 1e-9),
    }


def _relative_std(tokens: Tensor) -> Tensor:
    """Return the mean over channels of the standard deviation of unit vectors made of [R, D], times sqrt(D)."""
    unit = functional.normalize(tokens.float(), dim=-1)
    return unit.std(dim=0, unbiased=False).mean() * math.sqrt(tokens.shape[-1])


class CollapseAlarm:
    """Warns once for each sign that stays for several diagnoses; never during the warm-up, where features are alike."""

    def __init__(self, quiet_steps: int) -> None:
        """Start without any sign; `quiet_steps` are those in which nobody is warned."""
        self._quiet_steps = quiet_steps
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._in_a_row = dict.fromkeys(SIGNS, 0)
        self._recent = {name: deque[float](maxlen=IN_A_ROW) for name in SIGNS}
        self._said: set[str] = set()

    def look(self, step: int, figures: Mapping[str, float]) -> dict[str, float]:
        """Take the figures of a step and return those to add, on steps that were diagnosed.

        Args:
            step: number of the step, from 0.
            figures: what `train_step` returned.

        Returns:
            `collapse/spread`, the standard deviation over the mean of the last losses, once there are enough, and
            `collapse/signs`, how many signs there are; empty for a step without diagnosis.
        """
        self._losses.append(next(figures[name] for name in _WATCHED_LOSSES if name in figures))
        if "collapse/patch_std" not in figures:
            return {}
        added = self._spread()
        if step < self._quiet_steps:
            return added
        known = {**figures, **added}
        for name, (lowest, _) in SIGNS.items():
            value, recent = known.get(name, math.inf), self._recent[name]
            # With a small LayerScale features start alike and part.
            is_sign = value < lowest and value < _RISE * max(recent, default=math.inf)
            self._in_a_row[name] = self._in_a_row[name] + 1 if is_sign else 0
            recent.append(value)
        present = [name for name, count in self._in_a_row.items() if count >= IN_A_ROW]
        for name in present:
            if name not in self._said:
                logger.warning("step %d: %s = %.2g, below %g: %s", step, name, known[name], *SIGNS[name])
                self._said.add(name)
        return added | {"collapse/signs": float(len(present))}

    def _spread(self) -> dict[str, float]:
        if len(self._losses) < WINDOW:
            return {}
        losses = torch.tensor(self._losses, dtype=torch.float64)
        return {SPREAD: float(losses.std(unbiased=False) / losses.mean().abs().clamp_min(1e-12))}
