"""Measure what a list of millions of images costs: time to open it, and memory of each loader process.

    python benchmarks/data_index.py
    python benchmarks/data_index.py --images 20000000 --output data_index.json

A list of paths such as ImageNet's is written, read (which stores its index), and read again. Then a process is forked,
as the loader forks its own, that looks up names in the order of a training. Memory is what a process has for itself
(`Private_Dirty` in /proc); pages of the index file belong to all processes, and the system takes them back when it
needs them. Linux only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from dinov2_equi.data.datasets.holdout import split_holdout  # noqa: E402 (after the path guard)
from dinov2_equi.data.datasets.listed import ListedImages, read_list  # noqa: E402
from dinov2_equi.data.samplers import PositionSampler, SampleOrder  # noqa: E402
from dinov2_equi.evaluation.results import write_results  # noqa: E402

LOOKED_UP = 20_000
FAR = 14_000_000
"""The sample at which a resume is timed."""


def write_list(folder: Path, count: int) -> Path:
    """Write a list of `count` paths of 26 letters, of which the first exists."""
    (folder / "n00000000").mkdir()
    (folder / f"n00000000/{0:011d}.JPEG").touch()
    file = folder / "list.txt"
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            lines.write(f"n{number // 1300:08d}/{number:011d}.JPEG\n")
    return file


def private_bytes() -> int:
    """Return the memory that this process alone has written to."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) * 1024


def seconds_of(action: Callable[[], ListedImages]) -> tuple[float, ListedImages]:
    """Return how long an action takes, and what it returns."""
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def bytes_of_a_process(dataset: ListedImages) -> int:
    """Return by how much the memory of a forked process grows that looks up names in the order of a training."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        before = private_bytes()
        order = SampleOrder(len(dataset), seed=0)
        for position in range(LOOKED_UP):
            dataset.name(order.index(position))
        os.write(writing, str(private_bytes() - before).encode())
        os._exit(0)
    os.waitpid(process, 0)
    return int(os.read(reading, 64))


def seconds_to_resume(count: int) -> float:
    """Return how long a new order of `count` images takes for the first 64 from sample `FAR` on."""
    started = time.perf_counter()
    order = SampleOrder(count, seed=0)
    step = next(iter(PositionSampler(batch_size=64, start_step=FAR // 64, num_steps=1)))
    for position in step:
        order.index(position)
    return time.perf_counter() - started


def main() -> None:
    """Measure, print, and write the numbers where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5_000_000, help="paths in the list (default: 5000000)")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    arguments = parser.parse_args()
    count = arguments.images
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = str(Path(place) / "cache")
        file = write_list(Path(place), count)
        first, _ = seconds_of(lambda: read_list(file))
        before = private_bytes()
        again, dataset = seconds_of(lambda: read_list(file))
        opened = private_bytes() - before
        stored = sum(path.stat().st_size for path in (Path(place) / "cache").rglob("*.npy"))
        in_process = bytes_of_a_process(dataset)
        started = time.perf_counter()
        train, _ = split_holdout(dataset, 0.01, seed=0)
        numbers = {
            "seconds_first": first,
            "seconds_again": again,
            "stored_bytes_an_image": stored / count,
            "memory_bytes_an_image_opened": opened / count,
            "memory_bytes_an_image_in_a_loader_process": in_process / count,
            "seconds_to_resume_at_sample_14000000": seconds_to_resume(count),
            "seconds_to_hold_back": time.perf_counter() - started,
            "shared_bytes_an_image_of_held_back_split": train.indices.nbytes / count,
        }
    for name, value in numbers.items():
        print(f"{name:<44}{value:12.3f}")
    if arguments.output is not None:
        write_results(arguments.output, numbers, task="data_index", settings={"images": count})


if __name__ == "__main__":
    main()
