"""Vision transformer of DINOv2: same arguments, same weight names, same outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov2_equi.layers.block import LAYER_NORM_EPS, Block
from dinov2_equi.layers.mlp import Mlp
from dinov2_equi.layers.packing import pack, split_groups
from dinov2_equi.layers.patch_embed import PatchEmbed
from dinov2_equi.layers.swiglu_ffn import SwiGLUFFN

Features: TypeAlias = dict[str, Any]
"""`x_norm_clstoken` [B, D], `x_norm_regtokens` [B, R, D], `x_norm_patchtokens` [B, N, D], `x_prenorm` [B, T, D], and
the `masks` that were given, [B, N] bool or None; `x_norm_blocks`, a list of [B, T, D], where more blocks are wanted."""


def _identity_ffn(in_features: int, hidden_features: int, **_: Any) -> nn.Module:
    return nn.Identity()


FFN_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "swiglu": SwiGLUFFN,
    "swiglufused": SwiGLUFFN,
    "identity": _identity_ffn,
}


class DinoVisionTransformer(nn.Module):
    """Vision transformer with class token, optional registers and mask token.

    Tokens are `[CLS, registers, patches]`; registers have no position. Images may have any size that is a multiple of
    the patch; the position embedding is then interpolated as DINOv2 does.
    The initial weights are drawn as in DINOv2.

    Args:
        img_size: size the position embedding is made for, pixels, a number or (H, W).
        patch_size: side of a patch, pixels.
        in_chans: channels of the images.
        embed_dim: width D of the tokens.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the feed-forward layer over D.
        qkv_bias: bias of the query, key and value projections.
        ffn_bias: bias of the feed-forward layers.
        proj_bias: bias of the projection after attention.
        drop_path_rate: share of the images that skip a branch in training.
        drop_path_uniform: the same rate in all blocks, instead of rising linearly from 0.
        init_values: initial LayerScale; None or 0 for none.
        embed_layer: makes tokens of images.
        act_layer: activation of `mlp`.
        block_fn: transformer block.
        ffn_layer: `mlp`, `swiglu` (same as `swiglufused`) or `identity`.
        block_chunks: 0 names the weights `blocks.{i}`, above 0 `blocks.{chunk}.{i}`; nothing else changes.
        num_register_tokens: registers.
        interpolate_antialias: antialias when the position embedding is interpolated.
        interpolate_offset: number added to the grid size before it becomes a scale factor; 0 for an exact size.

    Raises:
        ValueError: for an unknown `ffn_layer`, or sizes that do not divide.
    """

    def __init__(  # noqa: PLR0917 - the order of DINOv2's arguments
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ffn_bias: bool = True,
        proj_bias: bool = True,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,
        init_values: float | None = None,
        embed_layer: Callable[..., PatchEmbed] = PatchEmbed,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        block_fn: Callable[..., Block] = Block,
        ffn_layer: str = "mlp",
        block_chunks: int = 1,
        num_register_tokens: int = 0,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
    ) -> None:
        super().__init__()
        if ffn_layer not in FFN_LAYERS:
            raise ValueError(f"unknown ffn_layer {ffn_layer!r}; known: {', '.join(FFN_LAYERS)}")
        self.embed_dim = self.num_features = embed_dim
        self.num_heads = num_heads
        self.n_blocks = depth
        self.patch_size = patch_size
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias = interpolate_antialias
        self.interpolate_offset = interpolate_offset

        self.patch_embed = embed_layer(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        self._create_tokens()
        options = {
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "proj_bias": proj_bias,
            "ffn_bias": ffn_bias,
            "init_values": init_values,
            "act_layer": act_layer,
            "ffn_layer": FFN_LAYERS[ffn_layer],
        }
        rates = drop_path_rates(drop_path_rate, depth, uniform=drop_path_uniform)
        blocks = [block_fn(embed_dim, num_heads, drop_path=rate, **options) for rate in rates]
        self.block_chunks = block_chunks
        self.blocks = nn.ModuleList(group_blocks(blocks, block_chunks))
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.head: nn.Module = nn.Identity()
        self.init_weights()

    def _create_tokens(self) -> None:
        # The order of these lines is the order of the keys in the released files.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, self.embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, self.num_register_tokens, self.embed_dim)) if self.num_register_tokens else None
        )
        self.mask_token = nn.Parameter(torch.zeros(1, self.embed_dim))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the initial weights: truncated normal 0.02 for linear layers and positions, 1e-6 for the tokens."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def block_list(self) -> list[Block]:
        """Return the blocks in order, whatever `block_chunks` is."""
        return [module for module in self.blocks.modules() if isinstance(module, Block)]

    def interpolate_pos_encoding(self, height: int, width: int) -> Tensor:
        """Return the position embedding [1, 1 + h*w, D] of an image of (height, width) pixels.

        Stored values where the grid is the one the model was built for, else bicubic interpolation in float32.
        """
        grid = self.patch_embed.grid_size(height, width)
        built_for = self.patch_embed.patches_resolution
        if grid == built_for:
            return self.pos_embed
        pos_embed = self.pos_embed.float()
        stored = pos_embed[:, 1:].reshape(1, *built_for, self.embed_dim).permute(0, 3, 1, 2)  # [1, D, h, w]
        # DINOv2 passes the scale, not the size, when there is an offset: the sampling points then differ a little,
        # and the released weights were trained with exactly these.
        offset = self.interpolate_offset
        scale = tuple((new + offset) / old for new, old in zip(grid, built_for, strict=True)) if offset else None
        patches = functional.interpolate(
            stored,
            size=None if scale else grid,
            scale_factor=scale,
            mode="bicubic",
            antialias=self.interpolate_antialias,
        )
        if patches.shape[2:] != grid:
            raise ValueError(f"interpolate_offset {offset} turns the patch grid {grid} into {tuple(patches.shape[2:])}")
        patches = patches.permute(0, 2, 3, 1).flatten(1, 2)  # [1, N, D]
        return torch.cat((pos_embed[:, :1], patches), dim=1).to(self.pos_embed.dtype)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return the tokens [B, 1 + registers + N, D] that enter the first block.

        Args:
            x: images [B, C, H, W].
            masks: [B, N] bool, True where a patch is replaced by the mask token.

        Raises:
            ValueError: if the masks do not fit the images.
        """
        height, width = x.shape[-2:]
        patches = self.patch_embed(x)  # [B, N, D]
        if masks is not None:
            if masks.shape != patches.shape[:2]:
                raise ValueError(f"expected masks of shape {list(patches.shape[:2])}, got {list(masks.shape)}")
            patches = torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        cls_token = self.cls_token.expand(patches.shape[0], -1, -1)  # [B, 1, D]
        tokens = torch.cat((cls_token, patches), dim=1)  # [B, 1+N, D]
        tokens = tokens + self.interpolate_pos_encoding(height, width)
        if self.register_tokens is None:
            return tokens
        registers = self.register_tokens.expand(tokens.shape[0], -1, -1)  # [B, R, D]
        return torch.cat((tokens[:, :1], registers, tokens[:, 1:]), dim=1)

    @overload
    def forward_features(
        self, x: Tensor, masks: Tensor | None = None, *, more_blocks: Sequence[int] = ()
    ) -> Features: ...

    @overload
    def forward_features(
        self,
        x: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        *,
        more_blocks: Sequence[int] = (),
    ) -> list[Features]: ...

    @overload
    def forward_features(
        self,
        x: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
        *,
        more_blocks: Sequence[int] = (),
    ) -> Features | list[Features]: ...

    def forward_features(
        self,
        x: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
        *,
        more_blocks: Sequence[int] = (),
    ) -> Features | list[Features]:
        """Return the features of images, or of several crop sizes in one packed pass.

        Args:
            x: images [B, C, H, W], or a list of such tensors, one for each crop size.
            masks: [B, N] bool or None, True where a patch is hidden; for a list of crops a list of these.
            more_blocks: indices of blocks, counted from 0, whose output is wanted too, through the final norm.

        Returns:
            A `Features` dictionary, or a list of them in the order of the crops.

        Raises:
            ValueError: if crops and masks do not fit each other.
        """
        if isinstance(x, Tensor):
            if not (masks is None or isinstance(masks, Tensor)):
                raise ValueError("expected one mask tensor or None for one image tensor, got a list of masks")
            return self._forward_crops([x], [masks], more_blocks)[0]
        if isinstance(masks, Tensor):
            raise ValueError("expected a list of masks, one for each crop size, got a tensor")
        return self._forward_crops(x, [None] * len(x) if masks is None else masks, more_blocks)

    def _forward_crops(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None], more_blocks: Sequence[int]
    ) -> list[Features]:
        if len(crops) == 0 or len(crops) != len(masks):
            raise ValueError(f"expected as many masks as crop sizes and at least one, got {len(masks)}, {len(crops)}")
        x, layout = pack([self.prepare_tokens_with_masks(*pair) for pair in zip(crops, masks, strict=True)])
        outputs = {}
        for index, block in enumerate(self.block_list()):
            x = block(x, layout)
            if index in more_blocks:
                outputs[index] = split_groups(self.norm(x), layout)
        prenorm = split_groups(x, layout)  # each [B, T, D]
        normed = split_groups(self.norm(x), layout)
        first_patch = 1 + self.num_register_tokens
        features: list[Features] = [
            {
                "x_norm_clstoken": after[:, 0],  # [B, D]
                "x_norm_regtokens": after[:, 1:first_patch],  # [B, R, D]
                "x_norm_patchtokens": after[:, first_patch:],  # [B, N, D]
                "x_prenorm": before,
                "masks": mask,
            }
            for before, after, mask in zip(prenorm, normed, masks, strict=True)
        ]
        if more_blocks:
            for crop, item in enumerate(features):
                item["x_norm_blocks"] = [outputs[index][crop] for index in more_blocks]
        return features

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Return the patch tokens after some of the blocks.

        Args:
            x: images [B, C, H, W].
            n: the last n blocks, or the indices of blocks, counted from 0.
            reshape: give [B, D, h, w] instead of [B, N, D].
            return_class_token: give pairs (patch tokens, class token [B, D]).
            norm: apply the final norm.

        Raises:
            ValueError: if a block does not exist.
        """
        outputs = self._outputs_of_blocks(x, self._block_indices(n))
        if norm:
            outputs = [self.norm(out) for out in outputs]
        class_tokens = [out[:, 0] for out in outputs]
        patches = [out[:, 1 + self.num_register_tokens :] for out in outputs]  # each [B, N, D]
        if reshape:
            grid = self.patch_embed.grid_size(x.shape[-2], x.shape[-1])
            patches = [
                out.reshape(out.shape[0], *grid, -1).permute(0, 3, 1, 2).contiguous() for out in patches
            ]  # [B, D, h, w]
        if return_class_token:
            return tuple(zip(patches, class_tokens, strict=True))
        return tuple(patches)

    def _block_indices(self, n: int | Sequence[int]) -> list[int]:
        wanted = list(range(self.n_blocks - n, self.n_blocks)) if isinstance(n, int) else list(n)
        if not wanted or min(wanted) < 0 or max(wanted) >= self.n_blocks:
            raise ValueError(f"expected n between 1 and {self.n_blocks}, or indices of these blocks from 0, got {n}")
        return wanted

    def _outputs_of_blocks(self, x: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """Return [B, T, D] after each wanted block, in the order of the blocks."""
        tokens, layout = pack([self.prepare_tokens_with_masks(x)])
        outputs = []
        for index, block in enumerate(self.block_list()):
            tokens = block(tokens, layout)
            if index in wanted:
                outputs.extend(split_groups(tokens, layout))
        return outputs

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
        is_training: bool = False,
        more_blocks: Sequence[int] = (),
    ) -> Any:
        """Return all features when `is_training`, else the head applied to the class token.

        Args:
            x: images [B, C, H, W], or a list of crops of several sizes.
            masks: see `forward_features`.
            is_training: return what `forward_features` returns.
            more_blocks: see `forward_features`.

        Returns:
            `Features`, or [B, D] (the head is the identity unless replaced); lists of these for a list of crops.
        """
        features = self.forward_features(x, masks, more_blocks=more_blocks)
        if is_training:
            return features
        if isinstance(features, list):
            return [self.head(item["x_norm_clstoken"]) for item in features]
        return self.head(features["x_norm_clstoken"])


def drop_path_rates(rate: float, depth: int, *, uniform: bool) -> list[float]:
    """Return the drop rate of each block: all `rate`, or rising linearly from 0 to `rate`."""
    if uniform or depth == 1:
        return [rate] * depth
    return [rate * index / (depth - 1) for index in range(depth)]


def group_blocks(blocks: Sequence[nn.Module], block_chunks: int) -> list[nn.Module]:
    """Return the entries of `blocks`: the blocks, or chunks of them that carry the block's index as its name.

    Raises:
        ValueError: if there are more chunks than blocks.
    """
    if block_chunks == 0:
        return list(blocks)
    size = chunk_size(len(blocks), block_chunks)
    return [
        nn.ModuleDict({str(index): blocks[index] for index in range(start, min(start + size, len(blocks)))})
        for start in range(0, len(blocks), size)
    ]


def chunk_size(depth: int, block_chunks: int) -> int:
    """Return how many blocks a chunk holds; the last chunks are more or smaller when the depth does not divide.

    Raises:
        ValueError: if there are more chunks than blocks.
    """
    if not 1 <= block_chunks <= depth:
        raise ValueError(f"expected block_chunks between 0 and the depth {depth}, got {block_chunks}")
    return depth // block_chunks
