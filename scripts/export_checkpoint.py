"""Turn any checkpoint of a training into files that others read, and check them against it.

    python scripts/export_checkpoint.py runs/mine --output exported
    python scripts/export_checkpoint.py runs/mine/checkpoints/step_00012500 --output exported

Takes a run (its newest undamaged checkpoint, or that of --step) or a checkpoint's folder, sharded or not, of any number
of processes. Writes the teacher:

* `teacher_checkpoint.pth`: DINOv2's layout, with heads and the split of the features; `torch.hub` loads it too;
* `teacher_backbone_pretrain.pth`: the backbone alone with the names of the released weights, for `torch.hub`;
* `teacher_backbone.safetensors`: the same as safetensors;
* `equi_branch.safetensors`: the decoder, where there is one.

All are read back before the first one takes its name. If one differs from the checkpoint, none is written, and the exit
code is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402 (after the path guard)
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

from dinov2_equi.hub.exporters import TOLERANCE, Source  # noqa: E402
from dinov2_equi.models.vision_transformer import DinoVisionTransformer  # noqa: E402
from dinov2_equi.run.command import EXIT_DONE, EXIT_FAILED, command_parser, run_command  # noqa: E402
from dinov2_equi.run.export import export  # noqa: E402
from dinov2_equi.train.export import BACKBONE_FILE, BRANCH_FILE, TEACHER_FILE, export_teacher  # noqa: E402
from dinov2_equi.train.from_checkpoint import find_checkpoint, model_of  # noqa: E402
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch  # noqa: E402

FILES = {"safetensors": BACKBONE_FILE, "pth": f"{Path(BACKBONE_FILE).stem}_pretrain.pth"}
"""The backbone alone, by the formats of `run/export.py`."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="the folder of a run or of one of its checkpoints")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint of a run (default: the newest)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the files")
    return parser.parse_args(argv)


def make_source(model: SSLMetaArch) -> Source:
    """Return the teacher's backbone as what `run/export.py` writes."""
    backbone, cfg = model.teacher["backbone"], model.cfg
    assert isinstance(backbone, DinoVisionTransformer)
    return Source(backbone, Path(BACKBONE_FILE).stem, cfg.crops.global_crops_size, cfg.data.mean, cfg.data.std)


def differing(written: Mapping[str, Tensor], weights: Mapping[str, Tensor], part: str) -> list[str]:
    """Return the tensors of a part of the model, such as `teacher`, that were not written bit for bit."""
    wanted = {name.removeprefix(f"{part}."): t for name, t in weights.items() if name.startswith(f"{part}.")}
    return [name for name, t in wanted.items() if name not in written or not torch.equal(written[name], t)]


def write_and_check(model: SSLMetaArch, weights: Mapping[str, Tensor], folder: Path) -> bool:
    """Write all files, say how each compares with the weights of a checkpoint, and return whether all are right."""
    export_teacher(model, folder)
    written = {
        TEACHER_FILE: differing(torch.load(folder / TEACHER_FILE, weights_only=True)["teacher"], weights, "teacher")
    }
    if (folder / BRANCH_FILE).exists():
        written[BRANCH_FILE] = differing(load_file(folder / BRANCH_FILE), weights, "equi")
    for name, wrong in written.items():
        sys.stdout.write(f"{name:<32}{'DIFFERS in ' + ', '.join(wrong[:3]) if wrong else 'bit for bit'}\n")
    is_sound = not any(written.values())
    for name, found in export(make_source(model), tuple(FILES), folder).items():
        is_same = not isinstance(found, str) and found <= TOLERANCE
        is_sound &= is_same
        text = f"not written: {found}" if isinstance(found, str) else f"largest difference of tokens {found:.1e}"
        sys.stdout.write(f"{FILES[name]:<32}{text}{'' if is_same else '  TOO LARGE'}\n")
    return is_sound


def command(args: argparse.Namespace) -> int:
    """Export, read back, and give the files their names if they are right."""
    checkpoint = find_checkpoint(args.checkpoint.expanduser(), args.step)
    model = model_of(checkpoint)
    sys.stdout.write(f"step {checkpoint.step} of {checkpoint.path}\n")
    output = args.output.expanduser()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output) as place:
        if not write_and_check(model, checkpoint.tensors["model"], Path(place)):
            sys.stdout.write("nothing was written, as a file differs from the checkpoint\n")
            return EXIT_FAILED
        for path in sorted(Path(place).iterdir()):
            path.replace(output / path.name)
    sys.stdout.write(f"written to {output}\n")
    return EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(command, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
