"""Look at what a backbone sees: features as colours, attention, similar patches, and a run's reconstructions.

    python dinov2_equi/run/visualize.py photo1.jpg photo2.jpg --weights runs/mine --output looks
    python dinov2_equi/run/visualize.py photo.jpg --weights hub:dinov2_vits14 --size 518 --output looks

Writes NAME_pca.png and NAME_attention.png for each image, equivariance.png for a run with a decoder, and index.html
with all of it, where a click on a patch shows which others are alike.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dinov2_equi.config.derive import derive
from dinov2_equi.data.datasets.base import ImageDataset
from dinov2_equi.data.datasets.channels import as_channels, channels_as_rgb
from dinov2_equi.data.datasets.files import ImageFiles
from dinov2_equi.data.transforms import EvalTransform, load_images, normalize
from dinov2_equi.evaluation.eval_model import EvalModel, shared_channels
from dinov2_equi.evaluation.feature_maps import class_attention, compact_directions
from dinov2_equi.evaluation.figures import write_figure
from dinov2_equi.evaluation.pictures import pca_colors
from dinov2_equi.evaluation.results import write_text_atomically
from dinov2_equi.evaluation.visualization import ImageView, attention_picture, pca_picture, render_page
from dinov2_equi.models.vision_transformer import DinoVisionTransformer
from dinov2_equi.run.command import EXIT_DONE, add_device, command_parser, run_command
from dinov2_equi.run.load import CONFIG_FILE, FORMS_OF_ONE, is_run, load_eval_model
from dinov2_equi.run.pictures import PCA_PATCHES, draw_reconstructions
from dinov2_equi.train.loop import CHECKPOINTS, load_finished
from dinov2_equi.train.preview import make_preview
from dinov2_equi.train.settings import load_run_config


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--weights", required=True, metavar="WEIGHTS", help=f"one of: {FORMS_OF_ONE}")
    parser.add_argument("--size", type=int, help=f"image side, pixels (default: {PCA_PATCHES} patches)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("looks"),
        metavar="DIR",
        help="folder of the pictures and the page (default: looks)",
    )
    add_device(parser)
    return parser.parse_args(argv)


def look(args: argparse.Namespace, model: EvalModel, files: ImageDataset) -> list[ImageView]:
    """Return what is shown of each image.

    Raises:
        ValueError: for a size that is no whole number of patches, or a backbone whose patches make no square.
    """
    size = args.size or (PCA_PATCHES * model.patch_size if model.patch_size > 1 else model.image_size)
    model.check_size(size)
    images = load_images(files, range(len(files)), EvalTransform(size)).to(args.device)
    tokens = model.to(args.device).tokens(images).patches.float().cpu()  # [n, N, D]
    side = round(tokens.shape[1] ** 0.5)
    colors = pca_colors(tokens, (side, side))
    attention = _attention(model, images, (side, side))
    return [
        ImageView(
            name=Path(files.name(index)).name,
            image=channels_as_rgb(images[index]).cpu(),
            pca=colors[index],
            attention=None if attention is None else attention[index],
            directions=compact_directions(tokens[index]),
        )
        for index in range(len(files))
    ]


def _attention(model: EvalModel, images: Tensor, grid: tuple[int, int]) -> Tensor | None:
    """Return the attention of the class token [n, heads, h, w], or None for a backbone of another library."""
    if not isinstance(model.backbone, DinoVisionTransformer):
        return None
    attention = class_attention(model.backbone, normalize(images, model.mean, model.std)).cpu()  # [n, heads, N]
    return attention.reshape(*attention.shape[:2], *grid)


def strip(weights: str, files: ImageDataset, device: torch.device) -> Figure | None:
    """Return views, targets and reconstructions of a run, or None where there is no decoder or no checkpoint."""
    folder = Path(weights).expanduser()
    if not is_run(weights) or not (folder / CHECKPOINTS).is_dir():
        return None
    cfg = load_run_config(folder / CONFIG_FILE)
    if cfg.equi.family is None or cfg.equi.loss_weight == 0:
        return None
    state = load_finished(cfg, derive(cfg, world_size=1), device=device, output_dir=folder)
    preview = make_preview(cfg, state.model, files, len(files), device)
    return None if preview is None else draw_reconstructions(preview)


def write(folder: Path, title: str, views: list[ImageView], equivariance: Figure | None) -> None:
    """Write all pictures and the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, view in enumerate(views):
        stem = Path(view.name).stem
        if any(Path(other.name).stem == stem for other in views[:number]):
            stem = f"{stem}_{number + 1}"  # of another folder
        pca_picture(view).save(folder / f"{stem}_pca.png")
        attention = attention_picture(view)
        if attention is not None:
            attention.save(folder / f"{stem}_attention.png")
    if equivariance is not None:
        write_figure(folder / "equivariance.png", equivariance)
    write_text_atomically(folder / "index.html", render_page(title, views, equivariance))


def command(args: argparse.Namespace) -> int:
    """Look at the images, and write pictures and page."""
    files: ImageDataset = ImageFiles(args.images)
    model = load_eval_model(args.weights, size=args.size)
    channels = shared_channels([model])
    if channels is not None:
        files = as_channels(files, channels, "the list of files")
    views = look(args, model, files)
    write(args.output, model.name, views, strip(args.weights, files, torch.device(args.device)))
    print(f"written: {args.output / 'index.html'}")
    return EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(command, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
