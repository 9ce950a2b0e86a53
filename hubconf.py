"""Entry points of `torch.hub.load`; needs torch alone.

`dinov2_equi_vit{s,b,l,g}{14,16}[_reg]` are ours; `dinov2_vit{s,b,l,g}14[_reg][_lc]` load what DINOv2 released.
"""

from dinov2_equi.hub import backbones as _backbones
from dinov2_equi.hub import released as _released

dependencies = ["torch"]

globals().update(_backbones.ENTRY_POINTS)
globals().update(_released.ENTRY_POINTS)
