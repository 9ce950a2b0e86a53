"""A backbone in the files of other programs. Every exporter returns a way to compute with what it wrote."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_equi.hub.any_size import positions_of_any_size
from dinov2_equi.models.layouts import to_timm, to_transformers
from dinov2_equi.models.registry import ARCHS, build_backbone
from dinov2_equi.models.vision_transformer import DinoVisionTransformer
from dinov2_equi.models.weights import load_exact, read_state_dict, rechunk_blocks

TOLERANCE = 1e-4
"""Largest difference of normalised tokens, of order 1, at which an export is taken for the same network in float32."""

Run = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Normalised images [B, 3, H, W] -> class tokens [B, D] and patch tokens [B, N, D]."""


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        backbone: in evaluation mode on the CPU.
        name: of the files.
        size: side of the images for formats that fix it, pixels.
        mean: of the channels, for image processors.
        std: of the channels.
    """

    backbone: DinoVisionTransformer
    name: str
    size: int
    mean: Sequence[float]
    std: Sequence[float]

    @property
    def state(self) -> dict[str, Tensor]:
        """The weights under the names of the released files."""
        state = {name: tensor.detach().contiguous() for name, tensor in self.backbone.state_dict().items()}
        return rechunk_blocks(state, 0, depth=0)

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return self.backbone.patch_embed.in_chans

    @property
    def trained_size(self) -> int:
        """Side of the images that the position embedding was made for, pixels."""
        return self.backbone.patch_embed.patches_resolution[0] * self.backbone.patch_size


class TokenOutputs(nn.Module):
    """A backbone as a plain function from images to class and patch tokens, for formats that record one."""

    def __init__(self, backbone: DinoVisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return class tokens [B, D] and patch tokens [B, N, D] of normalised images [B, 3, H, W]."""
        features = self.backbone.forward_features(x)
        return features["x_norm_clstoken"], features["x_norm_patchtokens"]


def export_safetensors(source: Source, folder: Path) -> Run:
    """Write `NAME.safetensors`, with the names of the released files."""
    path = folder / f"{source.name}.safetensors"
    _import("safetensors.torch").save_file(source.state, path)
    return _reloaded(source, path)


def export_pth(source: Source, folder: Path) -> Run:
    """Write `NAME_pretrain.pth`, as DINOv2 releases its backbones."""
    path = folder / f"{source.name}_pretrain.pth"
    torch.save(source.state, path)
    return _reloaded(source, path)


def _reloaded(source: Source, path: Path) -> Run:
    theirs = source.backbone
    arch = _arch_of(theirs)
    again = build_backbone(
        arch,
        img_size=source.trained_size,
        patch_size=theirs.patch_size,
        in_chans=theirs.patch_embed.in_chans,
        num_register_tokens=theirs.num_register_tokens,
        init_values=1.0 if "blocks.0.ls1.gamma" in source.state else None,
        ffn_layer="swiglufused" if "blocks.0.mlp.w12.weight" in source.state else "mlp",
        interpolate_offset=theirs.interpolate_offset,
        interpolate_antialias=theirs.interpolate_antialias,
    ).eval()
    load_exact(again, read_state_dict(path))
    return TokenOutputs(again)


def _arch_of(backbone: DinoVisionTransformer) -> str:
    wanted = (backbone.embed_dim, backbone.n_blocks, backbone.num_heads)
    return next(name for name, a in ARCHS.items() if (a.embed_dim, a.depth, a.num_heads) == wanted)


def export_transformers(source: Source, folder: Path) -> Run:
    """Write a folder that `AutoModel.from_pretrained` loads as Dinov2Model or Dinov2WithRegistersModel.

    Beside it the image processor: the shorter side to 256/224 of the size, the centre cut out, mean and deviation.
    """
    transformers = _import("transformers")
    transformers.logging.disable_progress_bar()
    backbone, state = source.backbone, source.state
    if "blocks.0.ls1.gamma" not in state:  # transformers' DINOv2 always has LayerScale; 1 is the same as none
        scales = (f"blocks.{block}.ls{number}.gamma" for block in range(backbone.n_blocks) for number in (1, 2))
        state |= dict.fromkeys(scales, torch.ones(backbone.embed_dim))
    registers = backbone.num_register_tokens
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=backbone.embed_dim,
        num_hidden_layers=backbone.n_blocks,
        num_attention_heads=backbone.num_heads,
        image_size=source.trained_size,
        patch_size=backbone.patch_size,
        num_channels=backbone.patch_embed.in_chans,
        use_swiglu_ffn="blocks.0.mlp.w12.weight" in state,
        **({"num_register_tokens": registers} if registers else {}),
    )
    config.architectures = [f"{kind}Model"]
    place = folder / "transformers"
    config.save_pretrained(place)
    _import("safetensors.torch").save_file(
        to_transformers(state), place / "model.safetensors", metadata={"format": "pt"}
    )
    if source.num_channels == 3:  # image processors know no other images
        (place / "preprocessor_config.json").write_text(json.dumps(_processor(source), indent=2), encoding="utf-8")
    again = transformers.AutoModel.from_pretrained(place).eval()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = again(pixel_values=x).last_hidden_state
        return tokens[:, 0], tokens[:, 1 + registers :]

    return run


def _processor(source: Source) -> dict[str, Any]:
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(source.size * 256 / 224)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": source.size, "width": source.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(source.mean),
        "image_std": list(source.std),
        "do_convert_rgb": True,
    }


def export_timm(source: Source, folder: Path) -> Run:
    """Write `NAME_timm.safetensors`, weights for timm's VisionTransformer; without the mask token, which timm lacks."""
    timm = _import("timm")
    backbone, state = source.backbone, source.state
    path = folder / f"{source.name}_timm.safetensors"
    safetensors = _import("safetensors.torch")
    safetensors.save_file(to_timm(state), path)
    options: dict[str, Any] = {}
    if "blocks.0.mlp.w12.weight" in state:
        hidden = state["blocks.0.mlp.w12.weight"].shape[0]
        options = {
            "mlp_ratio": hidden / backbone.embed_dim,
            "mlp_layer": timm.layers.SwiGLUPacked,
            "act_layer": nn.SiLU,
        }
    if backbone.num_register_tokens:
        options |= {"reg_tokens": backbone.num_register_tokens, "no_embed_class": True}
    again = _import("timm.models.vision_transformer").VisionTransformer(
        img_size=source.trained_size,
        patch_size=backbone.patch_size,
        in_chans=backbone.patch_embed.in_chans,
        embed_dim=backbone.embed_dim,
        depth=backbone.n_blocks,
        num_heads=backbone.num_heads,
        init_values=1.0 if "blocks.0.ls1.gamma" in state else None,
        num_classes=0,
        **options,
    )
    load_exact(again.eval(), safetensors.load_file(path))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = again.forward_features(x)
        return tokens[:, 0], tokens[:, 1 + backbone.num_register_tokens :]

    return run


def export_onnx(source: Source, folder: Path) -> Run:
    """Write `NAME.onnx`: input `image` [batch, channels, height, width], outputs `cls` and `patches`.

    Any batch and size: height and width are multiples of the patch size, two patches or more. The position embedding is
    interpolated as by the source.
    """
    _import("onnxscript")
    runtime = _import("onnxruntime")
    path = folder / f"{source.name}.onnx"
    side = source.size
    program = torch.onnx.export(
        _of_any_size(source),
        (
            torch.zeros(2, source.num_channels, side, side + source.backbone.patch_size),
        ),  # not square, so that the axes stay apart
        dynamo=True,
        dynamic_shapes={"x": _any_shape(source)},
        input_names=["image"],
        output_names=["cls", "patches"],
        verbose=False,
    )
    assert program is not None
    program.save(path)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        cls, patches = session.run(None, {"image": x.numpy()})
        return torch.from_numpy(cls), torch.from_numpy(patches)

    return run


def export_torchscript(source: Source, folder: Path) -> Run:
    """Write `NAME.torchscript.pt`, a trace: any batch, one size. Loads without this package."""
    path = folder / f"{source.name}.torchscript.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the size is fixed, and said so; traces are on their way out
        traced = torch.jit.trace(_of_one_size(source), _example(source))
        traced.save(str(path))
        again: Run = torch.jit.load(str(path))
    return again


def export_torch_export(source: Source, folder: Path) -> Run:
    """Write `NAME.pt2` by `torch.export`: any batch and size, as `export_onnx`. Loads without this package."""
    path = folder / f"{source.name}.pt2"
    side = source.size
    images = torch.zeros(2, source.num_channels, side, side + source.backbone.patch_size)
    program = torch.export.export(_of_any_size(source), (images,), dynamic_shapes={"x": _any_shape(source)})
    torch.export.save(program, path)
    again: Run = torch.export.load(path).module()
    return again


def _of_one_size(source: Source) -> TokenOutputs:
    """Return the backbone with the position embedding of the size that is exported: nothing is left to interpolate."""
    backbone = copy.deepcopy(source.backbone)
    with torch.no_grad():
        positions = backbone.interpolate_pos_encoding(source.size, source.size)
    backbone.pos_embed = nn.Parameter(positions.clone())
    backbone.patch_embed.patches_resolution = backbone.patch_embed.grid_size(source.size, source.size)
    return TokenOutputs(backbone).eval()


def _of_any_size(source: Source) -> TokenOutputs:
    """Return the backbone with a position embedding whose interpolation can be recorded for all sizes at once."""
    backbone = copy.deepcopy(source.backbone)
    backbone.interpolate_pos_encoding = functools.partial(  # type: ignore[method-assign]
        positions_of_any_size, backbone
    )
    return TokenOutputs(backbone).eval()


def _any_shape(source: Source) -> dict[int, Any]:
    """Return which axes of the images are open: their number, and rows and columns in whole patches, two or more."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    rows, columns = (torch.export.Dim(name, min=2, max=1024) for name in ("rows", "columns"))
    return {0: batch, 2: source.backbone.patch_size * rows, 3: source.backbone.patch_size * columns}


def _example(source: Source) -> Tensor:
    return torch.zeros(2, source.num_channels, source.size, source.size)


EXPORTERS: dict[str, Callable[[Source, Path], Run]] = {
    "safetensors": export_safetensors,
    "pth": export_pth,
    "transformers": export_transformers,
    "timm": export_timm,
    "onnx": export_onnx,
    "torchscript": export_torchscript,
    "torch_export": export_torch_export,
}
"""By the names of the command line."""

RESAMPLED_OTHERWISE = ("transformers", "timm")
"""Formats that resample the position embedding in their own way: alike only at the size it was made for."""


ANY_SIZE = ("onnx", "torch_export")
"""Formats that record a computation, and leave the size of the images open."""


@torch.no_grad()
def difference(source: Source, run: Run, height: int, width: int) -> float:
    """Return the largest difference between the tokens of source and export on random images of a size, pixels."""
    x = torch.randn(3, source.num_channels, height, width, generator=torch.Generator().manual_seed(0))
    pairs = zip(TokenOutputs(source.backbone)(x), run(x), strict=True)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def _import(package: str) -> Any:
    """Return an optional package.

    Raises:
        ImportError: says what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.split(".")[0]
        raise ImportError(f"this format needs the package {name}: pip install {name} ({error})") from error
