"""Networks from a validated configuration: backbone, heads, split and branch."""

from __future__ import annotations

import torch
from torch import nn

from dinov2_equi.config.schema import Config, HeadConfig
from dinov2_equi.equi.branch import EquivarianceBranch
from dinov2_equi.equi.decoders.base import DecoderSettings
from dinov2_equi.equi.decoders.registry import DEFAULT_WIDTHS, build_decoder
from dinov2_equi.equi.families.base import FamilySettings
from dinov2_equi.equi.families.registry import build_family
from dinov2_equi.equi.feature_split import FeatureSplit
from dinov2_equi.equi.reconstruction import Reconstruction
from dinov2_equi.equi.targets import TARGETS
from dinov2_equi.equi.theta_regression import ThetaRegression
from dinov2_equi.layers.dino_head import DINOHead
from dinov2_equi.layers.expander import Expander
from dinov2_equi.models.registry import ARCHS, build_backbone
from dinov2_equi.models.vision_transformer import DinoVisionTransformer


def build_student_backbone(cfg: Config) -> DinoVisionTransformer:
    """Return the student's backbone with random weights."""
    student = cfg.student
    return build_backbone(
        student.arch,
        img_size=cfg.crops.global_crops_size,
        patch_size=student.patch_size,
        in_chans=cfg.data.in_channels,
        drop_path_rate=student.drop_path_rate,
        drop_path_uniform=student.drop_path_uniform,
        init_values=student.layerscale,
        ffn_layer=student.ffn_layer,
        block_chunks=student.block_chunks,
        qkv_bias=student.qkv_bias,
        proj_bias=student.proj_bias,
        ffn_bias=student.ffn_bias,
        num_register_tokens=student.num_register_tokens,
        interpolate_antialias=student.interpolate_antialias,
        interpolate_offset=student.interpolate_offset,
    )


def build_student(cfg: Config) -> nn.ModuleDict:
    """Return the student: `backbone`, `dino_head`, and `ibot_head` and `feature_split` where they are configured."""
    modules: dict[str, nn.Module] = {"backbone": build_student_backbone(cfg)}
    feature_dim = ARCHS[cfg.student.arch].embed_dim
    if has_split(cfg):
        split = FeatureSplit(feature_dim, equi_dim(cfg), cfg.equi.projection_dim)
        modules["feature_split"] = split
        feature_dim = split.invariant_dim
    modules["dino_head"] = _build_head(cfg.dino, feature_dim)
    if cfg.ibot.separate_head:
        modules["ibot_head"] = _build_head(cfg.ibot, feature_dim)
    return nn.ModuleDict(modules)


def _build_head(head: HeadConfig, in_dim: int) -> DINOHead:
    return DINOHead(
        in_dim,
        head.head_n_prototypes,
        nlayers=head.head_nlayers,
        hidden_dim=head.head_hidden_dim,
        bottleneck_dim=head.head_bottleneck_dim,
    )


def build_expander(cfg: Config) -> Expander | None:
    """Return VICReg's head, or None without that loss; its weights leave those of the other networks as they are."""
    if cfg.vicreg.loss_weight == 0:
        return None
    in_dim = ARCHS[cfg.student.arch].embed_dim
    if has_split(cfg):
        in_dim = (cfg.equi.projection_dim or in_dim) - equi_dim(cfg)
    with torch.random.fork_rng(devices=[]):
        return Expander(in_dim, cfg.vicreg.expander_dim, cfg.vicreg.expander_nlayers)


def has_split(cfg: Config) -> bool:
    """Return whether the features are divided: with a transform family, or for a baseline with the same projection."""
    return cfg.equi.family is not None or cfg.equi.split_without_transform


def equi_dim(cfg: Config) -> int:
    """Return the equivariant width: `equi.dim`, or a quarter of the divided width as in the paper."""
    if cfg.equi.dim is not None:
        return cfg.equi.dim
    return (cfg.equi.projection_dim or ARCHS[cfg.student.arch].embed_dim) // 4


def family_settings(cfg: Config) -> FamilySettings:
    """Return the ranges and the fill of the transforms."""
    equi = cfg.equi
    sigma_min, sigma_max = equi.blur_sigma_px
    return FamilySettings(
        max_rotation_deg=equi.max_rotation_deg,
        max_translation_px=equi.max_translation_px,
        max_brightness=equi.max_brightness,
        max_contrast=equi.max_contrast,
        max_saturation=equi.max_saturation,
        max_hue=equi.max_hue,
        blur_sigma_px=(sigma_min, sigma_max),
        max_zoom=equi.max_zoom,
        max_corner_px=equi.max_corner_px,
        fill=equi.fill,
        mixture=tuple(equi.mixture),
    )


def build_branch(cfg: Config) -> EquivarianceBranch | None:
    """Return the equivariance branch, or None without a transform family; without loss weight it has no objective.

    The objective draws its initial weights from a forked random state, so that a run with reconstruction and its
    control without start from the same networks and see the same stochastic depth.
    """
    equi = cfg.equi
    if equi.family is None:
        return None
    family = build_family(equi.family, family_settings(cfg))
    objective = None
    if equi.loss_weight > 0:
        with torch.random.fork_rng(devices=[]):
            objective = _build_objective(cfg, num_params=len(family.param_names))
    return EquivarianceBranch(
        family,
        objective,
        target=TARGETS[equi.target],
        num_steps=equi.num_steps,
        include_final=equi.include_final,
        only_unmasked=equi.only_unmasked,
        patch_fraction=equi.decoder.patch_fraction,
    )


def _build_objective(cfg: Config, *, num_params: int) -> nn.Module:
    """Return what finds the target in the equivariant tokens: a reconstruction, or a regression of theta."""
    equi, decoder = cfg.equi, cfg.equi.decoder
    target = TARGETS[equi.target]
    if target.is_theta:
        return ThetaRegression(equi_dim(cfg), num_params)
    patch_size = cfg.student.patch_size
    default_width = DEFAULT_WIDTHS[decoder.type](ARCHS[cfg.student.arch].embed_dim)
    settings = DecoderSettings(
        equi_dim=equi_dim(cfg),
        patch_size=patch_size // 2 if decoder.half_resolution else patch_size,
        num_images=target.num_images(equi.num_steps, include_final=equi.include_final),
        width=decoder.width or default_width,
        depth=decoder.depth,
        num_heads=decoder.num_heads,
        mlp_ratio=decoder.mlp_ratio,
        shared=decoder.shared,
        num_channels=cfg.data.in_channels,
    )
    return Reconstruction(
        build_decoder(decoder.type, settings),
        patch_size,
        view_1_alone=target.view_1_alone,
    )


def equi_block(cfg: Config) -> int | None:
    """Return the index of the block whose tokens hold the equivariant part, or None for the features as they end."""
    return None if cfg.equi.layer == "last" else int(cfg.equi.layer)
