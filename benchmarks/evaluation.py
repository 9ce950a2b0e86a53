"""Cost of the evaluation: the linear sweep against one classifier, stored features against bare passes, memory of k-NN.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --arch vit_small --images 512 --output evaluation.json

* `sweep`: passes of the backbone over training batches, with all classifiers of the sweep trained on them, over the
  same with a single classifier. The features are computed in every step, as in DINOv2's protocol: what is paid for is
  the backbone.
* `extraction`: images per second of `stored_features`, decoding, writing and all, over those of bare forward passes on
  the same images in memory.
* `knn`: memory above what the features take, for N test and R training images of D numbers; that of the whole
  similarity matrix beside it.

All on one thread, in turn, medians over the repeats; times are those of the thread.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402 (after the path guard)

from dinov2_equi.data.datasets.synthetic import SyntheticImages  # noqa: E402
from dinov2_equi.data.transforms import eval_images  # noqa: E402
from dinov2_equi.evaluation.eval_model import EvalModel  # noqa: E402
from dinov2_equi.evaluation.knn import weighted_knn  # noqa: E402
from dinov2_equi.evaluation.linear import CHOICES, DEFAULT_LEARNING_RATES, train_linear  # noqa: E402
from dinov2_equi.evaluation.model import random_backbone  # noqa: E402
from dinov2_equi.evaluation.results import write_results  # noqa: E402
from dinov2_equi.evaluation.stored_features import stored_features  # noqa: E402
from dinov2_equi.run.allocator import keep_freed_memory  # noqa: E402

NUM_CLASSES = 100


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--size", type=int, default=112, help="image side, pixels (default 112)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="of the linear sweep (default 3)")
    parser.add_argument("--images", type=int, default=128, help="of the extraction (default 128)")
    parser.add_argument("--knn", type=int, nargs=3, default=[2000, 200_000, 256], metavar=("N", "R", "D"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON as well")
    return parser.parse_args()


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median time of the thread for a piece of work, after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return statistics.median(times)


def sweep_ratio(args: argparse.Namespace, model: EvalModel) -> float:
    """Return the time of the whole sweep over that of a single classifier."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(args.batch_size, 3, args.size, args.size, generator=generator)
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), generator=generator)

    def train(choices: tuple[object, ...], rates: tuple[float, ...]) -> None:
        num_blocks = max(choice.blocks for choice in choices)  # type: ignore[attr-defined]
        batches = ((model.block_tokens(images, num_blocks), labels) for _ in range(args.steps))
        train_linear(
            batches,
            num_steps=args.steps,
            dim=model.backbone.embed_dim,  # type: ignore[arg-type]
            num_classes=NUM_CLASSES,
            batch_size=args.batch_size,
            choices=choices,  # type: ignore[arg-type]
            learning_rates=rates,
        )

    single = median_seconds(lambda: train(CHOICES[:1], DEFAULT_LEARNING_RATES[:1]), args.repeats)
    return median_seconds(lambda: train(CHOICES, DEFAULT_LEARNING_RATES), args.repeats) / single


def extraction_share(args: argparse.Namespace, model: EvalModel) -> float:
    """Return the rate of `stored_features` over that of bare forward passes."""
    dataset = SyntheticImages(length=args.images, size=(args.size * 5 // 4, args.size * 5 // 4), seed=0)
    images = eval_images(dataset, args.size, args.images)

    def bare() -> None:
        for batch in images.split(args.batch_size):
            model.block_tokens(batch, 4)

    def stored() -> None:
        with tempfile.TemporaryDirectory() as folder:
            stored_features(model, dataset, size=args.size, folder=Path(folder), batch_size=args.batch_size)

    return median_seconds(bare, args.repeats) / median_seconds(stored, args.repeats)


def knn_memory(num_test: int, num_train: int, dim: int) -> tuple[float, float]:
    """Return GiB that k-NN takes above the features, and GiB of the whole matrix of similarities."""
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(num_train, dim, generator=generator).half()
    test = torch.randn(num_test, dim, generator=generator).half()
    labels = torch.arange(num_train) % NUM_CLASSES
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weighted_knn(train, labels, test, torch.arange(num_test) % NUM_CLASSES)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) / 2**20, num_test * num_train * 4 / 2**30


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(1)
    memory, whole = knn_memory(*args.knn)  # first: the peak of the process only grows
    model = EvalModel("model", random_backbone(args.arch, img_size=args.size, patch_size=14), patch_size=14)
    numbers = {
        "sweep": sweep_ratio(args, model),
        "extraction": extraction_share(args, model),
        "knn_gib": memory,
        "knn_whole_matrix_gib": whole,
    }
    print(f"linear sweep of {len(CHOICES) * len(DEFAULT_LEARNING_RATES)} over one classifier: {numbers['sweep']:.2f}")
    print(f"stored features over bare forward passes: {numbers['extraction']:.2f}")
    n, r, d = args.knn
    print(f"k-NN of {n} x {r} x {d}: {memory:.2f} GiB above the features; the whole matrix is {whole:.2f} GiB")
    if args.output is not None:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        write_results(args.output, numbers, task="evaluation_cost", settings=settings)


if __name__ == "__main__":
    main()
