"""Mask2Former's head for `--framework mmseg`, as mmsegmentation configures it; needs mmdet.

Source: Cheng et al. 2022 (arXiv 2112.01527).
"""

from __future__ import annotations

from typing import Any

from mmengine.hub import get_config

from eval.segmentation.mmseg_settings import MmsegSettings

_CONFIG = "mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py"
_NO_OBJECT_WEIGHT = 0.1


def mask2former_head(settings: MmsegSettings, num_classes: int) -> Any:
    """Return the description of the head in mmsegmentation's config for ADE20K, on four maps of one width.

    Args:
        settings: `pyramid_channels` is the width of all parts; `queries`, `points` and the layers.
        num_classes: C.
    """
    width = settings.pyramid_channels
    head = get_config(_CONFIG).model.decode_head
    head.update(num_classes=num_classes, in_channels=[width] * 4, feat_channels=width, out_channels=width)
    head.num_queries = settings.queries
    head.loss_cls.class_weight = [1.0] * num_classes + [_NO_OBJECT_WEIGHT]
    head.train_cfg.num_points = settings.points
    encoder, decoder = head.pixel_decoder.encoder, head.transformer_decoder
    encoder.num_layers, decoder.num_layers = settings.encoder_layers, settings.decoder_layers
    for layer, factor in ((encoder.layer_cfg, 4), (decoder.layer_cfg, 8)):
        for part in layer.values():
            part.embed_dims = width
        layer.ffn_cfg.feedforward_channels = factor * width
    for part in (head.positional_encoding, head.pixel_decoder.positional_encoding):
        part.num_feats = width // 2
    return head
