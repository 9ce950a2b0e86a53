"""Settings of `--framework mmseg`; imports none of its packages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dinov2_equi.evaluation.dense.segmentation import HEADS, SegmentationSettings

UPERNET = "upernet"


@dataclass(frozen=True)
class MmsegSettings(SegmentationSettings):
    """What is trained with mmsegmentation, and how; with the attributes of `SegmentationSettings`.

    Attributes:
        heads: names that `head` may have; the further one is upernet, on a simple feature pyramid of the last block.
        pyramid_channels: of upernet's pyramid.
        channels: of upernet's own maps.
        auxiliary_weight: of the loss of upernet's second, small head on the third map; 0: there is none.
        amp: compute in bfloat16 where that is safe; on a CUDA device only, elsewhere everything is float32.
    """

    heads: ClassVar[tuple[str, ...]] = (*HEADS, UPERNET)
    pyramid_channels: int = 256
    channels: int = 512
    auxiliary_weight: float = 0.4
    amp: bool = False

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
            ValueError: names them.
        """
        super().check()
        if self.pyramid_channels < 1 or self.channels < 1 or self.auxiliary_weight < 0:
            raise ValueError(
                f"expected pyramid_channels >= 1, channels >= 1 and auxiliary_weight >= 0, got "
                f"{self.pyramid_channels}, {self.channels} and {self.auxiliary_weight}"
            )
        if self.head == UPERNET and self.batch_size < 2:
            raise ValueError(
                f"upernet normalises a map of one pixel over the batch: expected batch_size >= 2, got {self.batch_size}"
            )
