"""Time whole training steps with the equivariance branch against the same steps without it.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --archs vit_small vit_base --batch-sizes 256 128 --output train_step.json

The batch lies on the device, so that no loader takes part. Both runs are built from the same configuration, the one
without the branch by `equi.family=null`, and take turns of `--steps` steps; the overhead is the median over the rounds
of the ratio of their times. Operations are those of `scripts/describe.py`: matrix products, convolutions and attention,
without what moves no matrix. With a CUDA device the defaults are ViT-S, B and L with the published recipe, without one
the small run of `photos_2cores`. Memory is what the run holds and what a step adds at its peak (CUDA alone).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch  # noqa: E402 (after the path guard)

from dinov2_equi.config.derive import derive  # noqa: E402
from dinov2_equi.data.datasets.synthetic import SyntheticImages  # noqa: E402
from dinov2_equi.data.loaders import on_device  # noqa: E402
from dinov2_equi.evaluation.results import write_results  # noqa: E402
from dinov2_equi.layers.backend import describe_backend  # noqa: E402
from dinov2_equi.run.allocator import keep_freed_memory  # noqa: E402
from dinov2_equi.train import build  # noqa: E402
from dinov2_equi.train.describe import describe_step  # noqa: E402
from dinov2_equi.train.settings import load_run_config  # noqa: E402
from dinov2_equi.train.step import train_step  # noqa: E402

DEFAULTS = {
    "cuda": ("vitl16_short_equi", ["vit_small", "vit_base", "vit_large"], [128, 128, 64]),
    "cpu": ("photos_2cores", ["vit_micro"], [32]),
}
"""Configuration, architectures and batch sizes that are measured without being asked, by the kind of device."""

WITHOUT_BRANCH = ("equi.family=null", "equi.loss_weight=0")
WARM_UP_STEPS = 5


@dataclass(frozen=True)
class Run:
    """One configuration, ready to step."""

    step: Callable[[], object]
    gflops_per_image: float
    memory_mib: float
    """What its weights, gradients and optimiser hold, and what a step adds at its peak; 0 without CUDA."""


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds."""

    arch: str
    batch_size: int
    plain_ms: float
    equi_ms: float
    overhead: float
    overhead_spread: tuple[float, float]
    """Least and greatest overhead of a round."""
    overhead_flops: float
    images_per_second: float
    tflops_per_second: float
    plain_memory_mib: float
    equi_memory_mib: float


def build_run(config: Path, overrides: Sequence[str], device: torch.device) -> Run:
    """Return a run of a configuration with random weights and one batch of noise, after some steps of warm-up."""
    cfg = load_run_config([config], [*overrides, "data.augment_on=device", "train.num_workers=0"])
    derived = derive(cfg, world_size=1)
    held_before = _allocated_mib(device)
    torch.manual_seed(0)
    state = build.build_state(cfg, derived, device)
    state.model.train()
    images = SyntheticImages(cfg.train.batch_size_per_gpu, (256, 256))
    loader = build.build_loader(cfg, derived, images, start_step=0, pin_memory=False)
    batch = on_device(next(iter(loader)), device)
    values = build.build_schedules(cfg, derived).at(derived.total_steps // 2)

    def step() -> object:
        return train_step(state, batch, values, cfg, device)

    for _ in range(WARM_UP_STEPS):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        memory = torch.cuda.max_memory_allocated(device) / 2**20 - held_before
    else:
        memory = 0.0
    return Run(step, describe_step(cfg).flops / 1e9, memory)


def _allocated_mib(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0


def seconds(run: Run, steps: int, device: torch.device) -> float:
    """Return the time of so many steps."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        run.step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(arch: str, batch_size: int, args: argparse.Namespace, device: torch.device) -> Timing:
    """Time one architecture with and without the branch."""
    shared = [*args.overrides, f"student.arch={arch}", f"train.batch_size_per_gpu={batch_size}"]
    equi = build_run(args.config, shared, device)
    plain = build_run(args.config, [*shared, *WITHOUT_BRANCH], device)
    rounds = [(seconds(plain, args.steps, device), seconds(equi, args.steps, device)) for _ in range(args.rounds)]
    overheads = [with_branch / without - 1 for without, with_branch in rounds]
    plain_ms, equi_ms = (1000 * statistics.median(times) / args.steps for times in zip(*rounds, strict=True))
    return Timing(
        arch=arch,
        batch_size=batch_size,
        plain_ms=plain_ms,
        equi_ms=equi_ms,
        overhead=statistics.median(overheads),
        overhead_spread=(min(overheads), max(overheads)),
        overhead_flops=equi.gflops_per_image / plain.gflops_per_image - 1,
        images_per_second=1000 * batch_size / equi_ms,
        tflops_per_second=equi.gflops_per_image * batch_size / equi_ms,
        plain_memory_mib=plain.memory_mib,
        equi_memory_mib=equi.memory_mib,
    )


def parse_arguments(device: torch.device) -> argparse.Namespace:
    """Return the command line."""
    config, archs, batch_sizes = DEFAULTS[device.type]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", type=Path, default=ROOT / "configs" / f"{config}.yaml", help=f"default here: {config}")
    add("--archs", nargs="+", default=archs, metavar="NAME", help=f"default here: {' '.join(archs)}")
    add("--batch-sizes", nargs="+", type=int, default=batch_sizes, metavar="B", help="one for each architecture")
    add("--steps", type=int, default=10, help="of one turn (default 10)")
    add("--rounds", type=int, default=7, help="turns of each (default 7)")
    add("--output", type=Path, help="write the numbers to this JSON file")
    add("--set", nargs="+", default=[], dest="overrides", metavar="key=value", help="further settings for both")
    args = parser.parse_args()
    if len(args.batch_sizes) != len(args.archs):
        parser.error(f"{len(args.archs)} architectures need as many batch sizes, got {len(args.batch_sizes)}")
    return args


def main() -> None:
    """Measure, print a table, and write it where asked."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = parse_arguments(device)
    keep_freed_memory()
    print(describe_backend(device))
    titles = ("plain ms", "equi ms", "overhead", "FLOPs", "images/s", "TFLOP/s", "plain MiB", "equi MiB")
    print(f"{'':<12}{'B':>5}" + "".join(f"{title:>11}" for title in titles))
    timings = []
    for arch, batch_size in zip(args.archs, args.batch_sizes, strict=True):
        t = measure(arch, batch_size, args, device)
        shares = f"{t.overhead:11.1%}{t.overhead_flops:11.1%}"
        print(
            f"{arch:<12}{batch_size:>5}{t.plain_ms:11.1f}{t.equi_ms:11.1f}{shares}{t.images_per_second:11.0f}"
            f"{t.tflops_per_second:11.2f}{t.plain_memory_mib:11.0f}{t.equi_memory_mib:11.0f}",
            flush=True,
        )
        timings.append(t)
    if args.output is not None:
        settings = {key: value for key, value in vars(args).items() if key not in ("output", "config")}
        config_text = args.config.read_text(encoding="utf-8")
        numbers = {timing.arch: asdict(timing) for timing in timings}
        write_results(args.output, numbers, task="train_step", config_text=config_text, settings=settings)


if __name__ == "__main__":
    main()
