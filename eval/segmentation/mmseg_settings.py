"""Settings of `--framework mmseg`; imports none of its packages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dinov2_equi.evaluation.dense.segmentation import HEADS, SegmentationSettings

UPERNET, MASK2FORMER = "upernet", "mask2former"
_GROUPS = 32  # of channels, that mask2former normalises; of one channel, a map of one pixel could not be


@dataclass(frozen=True)
class MmsegSettings(SegmentationSettings):
    """What is trained with mmsegmentation, and how; with the attributes of `SegmentationSettings`.

    Attributes:
        heads: names that `head` may have; the further ones, upernet and mask2former, stand on a simple feature pyramid
            of the last block.
        pyramid_channels: of the pyramid, and of all parts of mask2former.
        channels: of upernet's own maps.
        auxiliary_weight: of the loss of upernet's second, small head on the third map; 0: there is none.
        queries: masks that mask2former predicts, each with a class.
        points: in an image, at which its masks are compared in training.
        encoder_layers: of its pixel decoder.
        decoder_layers: of its transformer decoder.
        amp: compute in bfloat16 where that is safe; on a CUDA device only, elsewhere everything is float32.
    """

    heads: ClassVar[tuple[str, ...]] = (*HEADS, UPERNET, MASK2FORMER)
    pyramid_channels: int = 256
    channels: int = 512
    auxiliary_weight: float = 0.4
    queries: int = 100
    points: int = 12544
    encoder_layers: int = 6
    decoder_layers: int = 9
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
        if min(self.queries, self.points, self.encoder_layers, self.decoder_layers) < 1:
            raise ValueError(
                f"expected queries, points, encoder_layers and decoder_layers >= 1, got {self.queries}, {self.points}, "
                f"{self.encoder_layers} and {self.decoder_layers}"
            )
        if self.head == MASK2FORMER and (self.pyramid_channels % _GROUPS or self.pyramid_channels < 2 * _GROUPS):
            raise ValueError(
                f"mask2former expects pyramid_channels to be a multiple of {_GROUPS} from {2 * _GROUPS} on, got "
                f"{self.pyramid_channels}"
            )
