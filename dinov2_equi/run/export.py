"""Write a backbone in the files of other programs, and check each against the source.

    python dinov2_equi/run/export.py --weights runs/mine --output exported
    python dinov2_equi/run/export.py --weights teacher_checkpoint.pth --formats transformers onnx --output out

Writes one file (or folder) a format and a model card, README.md. After writing, each is read back and given the same
random images; the largest difference of the tokens is printed. One that differs by more than 1e-4, or could not be
written, makes the exit code 1.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.results import write_text_atomically
from dinov2_equi.hub.exporters import ANY_SIZE, EXPORTERS, RESAMPLED_OTHERWISE, TOLERANCE, Source, difference
from dinov2_equi.models.vision_transformer import DinoVisionTransformer
from dinov2_equi.run.command import EXIT_DONE, EXIT_FAILED, command_parser, run_command
from dinov2_equi.run.load import OWN_FORMS, load_eval_model
from dinov2_equi.run.model_card import model_card

DEFAULT_FORMATS = ("safetensors", "pth")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(__doc__)
    parser.add_argument("--weights", required=True, metavar="WEIGHTS", help=f"one of: {OWN_FORMS}")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=tuple(EXPORTERS),
        default=list(DEFAULT_FORMATS),
        metavar="FORMAT",
        help=f"of {', '.join(EXPORTERS)} (default: {' '.join(DEFAULT_FORMATS)})",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the files")
    parser.add_argument("--name", help="of the files (default: that of the weights)")
    size = (
        "image side in pixels that torchscript is fixed to and the image processor makes; onnx and torch_export take "
        "any multiple of the patch size (default: the one the backbone was trained at)"
    )
    parser.add_argument("--size", type=int, help=size)
    return parser.parse_args(argv)


def make_source(args: argparse.Namespace, model: EvalModel) -> Source:
    """Return what is exported.

    Raises:
        ValueError: for a backbone of another library, or a size that is no whole number of patches.
    """
    if not isinstance(model.backbone, DinoVisionTransformer):
        raise ValueError(f"{model.name} is a backbone of another library; only DINOv2's architecture is exported")
    size = args.size or model.image_size
    model.check_size(size)
    stem = args.name or Path(args.weights).stem or model.name
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in stem)
    return Source(model.backbone, name, size, model.mean, model.std)


def export(source: Source, formats: Sequence[str], folder: Path) -> dict[str, float | str]:
    """Return by format how much an export differs from the source, or why there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, float | str] = {}
    for name in formats:
        try:
            run = EXPORTERS[name](source, folder)
        except (ImportError, ValueError) as error:
            found[name] = str(error)
            continue
        size = source.trained_size if name in RESAMPLED_OTHERWISE else source.size
        found[name] = difference(source, run, size, size)
        if name in ANY_SIZE:  # also one that was not recorded
            patch = source.backbone.patch_size
            found[name] = max(found[name], difference(source, run, size + 2 * patch, source.trained_size))
    return found


def command(args: argparse.Namespace) -> int:
    """Export and check, write the model card, and say what came of each format."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    source = make_source(args, load_eval_model(args.weights))
    found = export(source, args.formats, args.output)
    write_text_atomically(args.output / "README.md", model_card(source, args.weights, found))
    is_sound = True
    for name, result in found.items():
        is_same = not isinstance(result, str) and result <= TOLERANCE
        is_sound &= is_same
        what = f"not written: {result}" if isinstance(result, str) else f"largest difference {result:.1e}"
        print(f"{name:<14}{what}{'' if is_same or isinstance(result, str) else '  TOO LARGE'}")
    print(f"written to {args.output}")
    return EXIT_DONE if is_sound else EXIT_FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(command, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
