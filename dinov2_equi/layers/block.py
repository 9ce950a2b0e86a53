"""Transformer block with stochastic depth on a subset of the batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dinov2_equi.layers.attention import Attention
from dinov2_equi.layers.backend import AttendFunction
from dinov2_equi.layers.layer_scale import LayerScale
from dinov2_equi.layers.mlp import Mlp
from dinov2_equi.layers.packing import TokenLayout

LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class MicroBatch:
    """Which images of a batch are passed, where a batch is passed in parts.

    Attributes:
        index: number of the part, from 0.
        count: number of parts.
        images: images in each, of each of which there may be several crops; the rows are crop-major.
    """

    index: int
    count: int
    images: int

    def rows(self, chosen: Tensor) -> Tensor:
        """Return the part's own among the crops `chosen` [c] of the whole batch, counted from 0 within the part."""
        crop, image = chosen // (self.count * self.images), chosen % (self.count * self.images)
        mine = image // self.images == self.index
        return (crop * self.images + image % self.images)[mine]


_PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


def _products_context() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of `checkpoint` that keep the results of linear layers."""
    contexts: tuple[AbstractContextManager[None], AbstractContextManager[None]]
    contexts = create_selective_checkpoint_contexts(_PRODUCTS)
    return contexts


class TokenNorm(nn.LayerNorm):
    """LayerNorm whose parameters may be shorter numbers than its input, as those of a sharded block are.

    On CUDA autocast sees to it; on the CPU PyTorch refuses.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - PyTorch's name
        """Normalise the last axis of `input`, in the longer of the two number formats."""
        dtype = torch.promote_types(self.weight.dtype, input.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then feed-forward, each added to its input.

    In training a share `drop_path` of the images skips each of the two branches. The skipped images are not computed
    at all: the branch runs on a random subset, and what it adds is scaled up so that its expectation does not change.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop_path: float = 0.0,
        init_values: float | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        ffn_layer: Callable[..., nn.Module] = Mlp,
    ) -> None:
        """Build the block; `init_values` None or 0 means no LayerScale.

        Raises:
            ValueError: if `drop_path` is outside [0, 1).
        """
        super().__init__()
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"expected drop_path in [0, 1), got {drop_path}")
        self.drop_path = drop_path
        self.micro_batch: MicroBatch | None = None  # set while a batch is passed in parts
        self.checkpointed = False  # True: keeps its input alone, and runs again in the backward pass
        self.keep_products = False  # and keeps also the results of matrix products, which then do not run again
        self.norm1 = TokenNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = TokenNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = ffn_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, bias=ffn_bias)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()

    def forward(self, x: Tensor, layout: TokenLayout | None = None, attend: AttendFunction | None = None) -> Tensor:
        """Run the block.

        Args:
            x: packed tokens [R, D] with their `layout`; or [B, T, D] without one.
            layout: where each image lies in the packed tokens.
            attend: see `Attention`.

        Returns:
            A tensor of the shape of `x`.
        """
        if layout is None:
            batch, tokens, _ = x.shape
            return self.forward(x.flatten(0, 1), ((batch, tokens),), attend).view_as(x)  # [B, T, D]
        if not self.checkpointed or not torch.is_grad_enabled():
            return self._add_branches(x, layout, attend)
        # In the block, not around it: compiled, a block decides itself what it keeps. Draws the same images once more.
        run = partial(checkpoint, self._add_branches, x, layout, attend, use_reentrant=False)
        # A partial: torch.compile refuses a plain function of this module.
        out: Tensor = run(context_fn=partial(_products_context)) if self.keep_products else run()
        return out

    def _add_branches(self, x: Tensor, layout: TokenLayout, attend: AttendFunction | None) -> Tensor:
        attention = self._attention_branch if attend is None else partial(self._attention_branch, attend=attend)
        x = self._add_branch(x, layout, attention)
        return self._add_branch(x, layout, self._feed_forward_branch)

    def _attention_branch(self, x: Tensor, layout: TokenLayout, attend: AttendFunction | None = None) -> Tensor:
        out: Tensor = self.ls1(self.attn(self.norm1(x), layout, attend))
        return out

    def _feed_forward_branch(self, x: Tensor, layout: TokenLayout) -> Tensor:
        out: Tensor = self.ls2(self.mlp(self.norm2(x)))
        return out

    def _add_branch(self, x: Tensor, layout: TokenLayout, branch: Callable[[Tensor, TokenLayout], Tensor]) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return x + branch(x, layout)
        rows, scale, kept_layout = draw_subset(layout, self.drop_path, x.device, self.micro_batch)
        residual = branch(x.index_select(0, rows), kept_layout) * scale
        return x.index_add(0, rows, residual.to(x.dtype))


def draw_subset(
    layout: TokenLayout, drop_rate: float, device: torch.device, micro_batch: MicroBatch | None = None
) -> tuple[Tensor, Tensor, TokenLayout]:
    """Draw the images that a branch runs on, separately for each crop size.

    Of B images `max(int(B * (1 - drop_rate)), 1)` are kept, as in DINOv2. Uses the global random generator of `device`.
    For a micro-batch the draw is that of the whole batch: from the same random state all parts together keep what one
    pass would. How many of them are its own differs then, and may be 0.

    Returns:
        Row indices [R'] int64 of the kept tokens, the factor [R', 1] float32 that makes up for the dropped images
        (B / kept images of that crop size), and the layout of the kept rows.
    """
    rows, scales, kept_layout = [], [], []
    first_row = 0
    for images, tokens in layout:
        of_all = images if micro_batch is None else images * micro_batch.count
        kept = min(of_all, max(int(of_all * (1 - drop_rate)), 1))
        factor = of_all / max(kept, 1)
        chosen = torch.randperm(of_all, device=device)[:kept]  # [kept]
        if micro_batch is not None:
            chosen = micro_batch.rows(chosen)
            kept = len(chosen)
        in_image = torch.arange(tokens, device=device)  # [T]
        rows.append((first_row + chosen[:, None] * tokens + in_image).flatten())  # [kept*T]
        scales.append(torch.full((kept * tokens, 1), factor, device=device))
        kept_layout.append((kept, tokens))
        first_row += images * tokens
    return torch.cat(rows), torch.cat(scales), tuple(kept_layout)
