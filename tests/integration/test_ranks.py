"""The same run on one, two and four processes, in micro-batches or not: the same images, losses and weights; a resume
on another number."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dinov2_equi.data.batch import Batch
from dinov2_equi.distributed.env import get_rank, get_world_size
from dinov2_equi.fsdp.checkpoint import CheckpointStore
from dinov2_equi.logging.metrics import read_metrics
from dinov2_equi.train import guard
from dinov2_equi.train.outputs import StepOutput
from dinov2_equi.train.replay import replay_step
from dinov2_equi.train.state import TrainState
from dinov2_equi.train.step import NonFiniteLossError, train_step
from dinov2_equi.train.watchdog import EXIT_HUNG
from tests.ranks import exit_codes, launch_ranks

Run = Callable[..., int]

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.skipif(sys.platform == "win32", reason="needs fork"),
]
EVERYTHING = (
    "ibot.separate_head=true",
    "dino.koleo_loss_weight=0",
    "vicreg.loss_weight=1",
    "vicreg.expander_dim=32",
    "equi.decoder.width=32",
    "equi.source_2=teacher",
)
"""All that looks at more than one image: centres, variances and covariances, batch norm, Sinkhorn. Not KoLeo: which
neighbour is the nearest hangs on the last digit where features are as alike as those of noise after two steps. Not the
up-convolutions: before their batch norms some gradients are rounding, which AdamW makes as large as the others."""
NO_DROP = "student.drop_path_rate=0"
"""Every process drops residual branches of its own."""
EVERY_10 = "train.checkpoint_every_steps=10"


def sharded(strategy: str) -> tuple[str, ...]:
    """Return the words that shard student and teacher by a strategy."""
    networks = (
        f"{owner}.{name}" for owner in ("student", "teacher") for name in ("backbone", "dino_head", "ibot_head")
    )
    return tuple(f"compute_precision.{network}.sharding_strategy={strategy}" for network in networks)


def run_on(world_size: int, lean_run: Run, folder: Path, *words: str, parts: int = 1) -> list[int]:
    """Train with 8 images a step on so many processes, in so many micro-batches; return the exit codes.

    `words` say what is sharded, by default nothing.
    """
    sizes = (f"train.batch_size_per_gpu={8 // world_size // parts}", f"train.gradient_accumulation_steps={parts}")
    words = (*sharded("NO_SHARD"), *words)
    if world_size == 1:
        return [lean_run(folder, *sizes, *words)]
    return exit_codes(launch_ranks(world_size, lambda: lean_run(folder, *sizes, *words), on_a_machine=2))


def weights(folder: Path, step: int | None = None) -> dict[str, Tensor]:
    return CheckpointStore(folder / "checkpoints", read_only=True).load(step).tensors["model"]


def assert_same_run(one: Path, other: Path) -> None:
    """Losses within 1e-6 of their size, weights within 1e-5 after 20 steps: sums in another order."""
    for left, right in zip(
        read_metrics(one / "training_metrics.json"), read_metrics(other / "training_metrics.json"), strict=True
    ):
        for name in (name for name in left if name.endswith("_loss")):
            assert right[name] == pytest.approx(left[name], rel=1e-6, abs=1e-6), (name, left["iteration"])
    for name, tensor in weights(one).items():
        assert float((weights(other)[name] - tensor).abs().max()) < 1e-5, name


KINDS = {
    "koleo": ("equi.family=null", "equi.loss_weight=0", "train.centering=sinkhorn_knopp"),
    "upconv": (*EVERYTHING, "equi.decoder.type=upconv"),
}
"""DINO, iBOT and KoLeo; VICReg and the up-convolutions, with prototypes: with VICReg alone the bias of the last norm
has no gradient but rounding, as the expander's batch norm takes it out."""


def with_centering(name: str) -> tuple[str, ...]:
    return (NO_DROP, *EVERYTHING, f"train.centering={name}", EVERY_10)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, lean_run: Run) -> Callable[[str], Path]:
    """Return a function from the kind of centring to the folder of the run on one process."""

    @functools.cache
    def folder_of(centering: str) -> Path:
        folder = tmp_path_factory.mktemp(centering)
        assert run_on(1, lean_run, folder, *with_centering(centering)) == [0]
        return folder

    return folder_of


@pytest.mark.parametrize(("world_size", "centering"), [(2, "centering"), (2, "sinkhorn_knopp"), (4, "sinkhorn_knopp")])
def test_the_number_of_processes_changes_the_run(
    world_size: int, centering: str, single: Callable[[str], Path], tmp_path: Path, lean_run: Run
) -> None:
    assert run_on(world_size, lean_run, tmp_path, *with_centering(centering)) == [0] * world_size
    assert_same_run(single(centering), tmp_path)
    assert (tmp_path / "teacher_checkpoint.pth").is_file()


@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_change_the_run(
    world_size: int, single: Callable[[str], Path], tmp_path: Path, lean_run: Run
) -> None:
    words = with_centering("sinkhorn_knopp")
    assert run_on(world_size, lean_run, tmp_path, *words, parts=2) == [0] * world_size
    assert_same_run(single("sinkhorn_knopp"), tmp_path)


SPREAD = (NO_DROP, "student.layerscale=0", "optim.warmup_epochs=2", EVERY_10)
"""Features that differ: the nearest neighbour is not decided by rounding."""


@pytest.mark.parametrize("kind", ["koleo", "upconv"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_change_neighbours_or_the_batch_norm(
    world_size: int, kind: str, tmp_path: Path, lean_run: Run
) -> None:
    words = (*SPREAD, *KINDS[kind])
    assert run_on(1, lean_run, tmp_path / "whole", *words) == [0]
    assert run_on(world_size, lean_run, tmp_path / "parts", *words, parts=2) == [0] * world_size
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 2)])
def test_a_resume_on_another_number_of_processes_is_another_run(
    before: int, after: int, single: Callable[[str], Path], tmp_path: Path, lean_run: Run
) -> None:
    words = with_centering("centering")
    if before == 1:
        shutil.copytree(single("centering"), tmp_path, dirs_exist_ok=True)
    else:
        assert run_on(before, lean_run, tmp_path, *words) == [0] * before
    (tmp_path / "checkpoints" / "step_00000020").rename(tmp_path / "later")
    assert run_on(after, lean_run, tmp_path, *words) == [0] * after
    assert_same_run(single("centering"), tmp_path)


def test_a_resume_with_other_step_sizes_is_accepted(
    tmp_path: Path, lean_run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_on(2, lean_run, tmp_path, "optim.epochs=1", "optim.warmup_epochs=0") == [0, 0]
    assert lean_run(tmp_path, "train.batch_size_per_gpu=4") == 2
    assert "was 8, now 4" in capfd.readouterr().err


def test_processes_drop_the_same_branches_or_a_resume_draws_others(tmp_path: Path, lean_run: Run) -> None:
    words = (EVERY_10, "student.drop_path_rate=0.4")
    for name in ("whole", "parts"):
        assert run_on(2, lean_run, tmp_path / name, *words) == [0, 0]
    states = CheckpointStore(tmp_path / "whole" / "checkpoints", read_only=True).load(10).tensors["rng"]
    assert not torch.equal(states["cpu"], states["cpu.1"])
    (tmp_path / "parts" / "checkpoints" / "step_00000020").rename(tmp_path / "later")
    assert run_on(2, lean_run, tmp_path / "parts", *words) == [0, 0]
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "parts")[name], tensor), name


def test_a_signal_to_one_process_stops_the_others_elsewhere(tmp_path: Path, lean_run: Run) -> None:
    words = ("optim.epochs=2000", "train.batch_size_per_gpu=4", "train.checkpoint_every_steps=100000")
    children = launch_ranks(2, lambda: lean_run(tmp_path, *words))
    log = tmp_path / "training_metrics.json"
    deadline = time.monotonic() + 60
    while not (log.is_file() and len(log.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline, "no step within a minute"
        time.sleep(0.05)
    os.kill(children[1], signal.SIGTERM)
    assert exit_codes(children) == [75, 75]
    assert CheckpointStore(tmp_path / "checkpoints", read_only=True).latest_step() is not None


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve good images and four empty files."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        if number % 4 == 0:
            (folder / f"{number:02d}.png").write_bytes(b"")
    return folder


def test_bad_images_are_listed_twice_or_a_process_counts_its_own_alone(
    tmp_path: Path, photos: Path, lean_run: Run
) -> None:
    keys = (f"train.dataset_path={photos}", "data.holdout_fraction=0", "train.OFFICIAL_EPOCH_LENGTH=3")
    lists = []
    for world_size in (1, 2):
        assert run_on(world_size, lean_run, tmp_path / str(world_size), *keys) == [0] * world_size
        lists.append((tmp_path / str(world_size) / "bad_images.jsonl").read_text().splitlines())
    # The ranks of a step tell theirs one after the other, and images that stand in are drawn by position: the same.
    assert lists[0] == lists[1] and len(lists[0]) == 4


def test_too_many_bad_images_stop_one_process_and_the_others_wait_for_ever(
    tmp_path: Path, photos: Path, lean_run: Run
) -> None:
    keys = (f"train.dataset_path={photos}", "data.holdout_fraction=0", "data.max_bad_fraction=0.002")
    assert run_on(2, lean_run, tmp_path / "run", *keys) == [2, 2]
    lines = (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()
    assert len(lines) >= 2 and len(set(lines)) == len(lines)


# --------------------------------------------------------------------------------------------------------- sharded


@pytest.mark.parametrize(
    ("world_size", "strategy", "parts"),
    [
        (2, "SHARD_GRAD_OP", 1),
        (2, "SHARD_GRAD_OP", 2),
        (2, "FULL_SHARD", 2),
        (4, "hybrid", 1),
        pytest.param(4, "SHARD_GRAD_OP", 1, marks=pytest.mark.slow),
        pytest.param(4, "FULL_SHARD", 1, marks=pytest.mark.slow),
    ],
)
def test_sharded_parameters_make_another_run(
    world_size: int, strategy: str, parts: int, single: Callable[[str], Path], tmp_path: Path, lean_run: Run
) -> None:
    words = (*with_centering("sinkhorn_knopp"), *sharded(strategy))
    assert run_on(world_size, lean_run, tmp_path, *words, parts=parts) == [0] * world_size
    assert_same_run(single("sinkhorn_knopp"), tmp_path)
    names = {path.name for path in (tmp_path / "checkpoints" / "step_00000020").glob("model*")}
    assert "returned a view" not in (tmp_path / "logs" / "log.txt").read_text()
    assert names == {f"model-{rank:05d}-of-{world_size:05d}.safetensors" for rank in range(world_size)}


@pytest.mark.parametrize("kept", ["full", "selective"])
def test_recomputed_activations_of_sharded_blocks_make_another_run(
    kept: str, single: Callable[[str], Path], tmp_path: Path, lean_run: Run
) -> None:
    words = (*with_centering("sinkhorn_knopp"), *sharded("FULL_SHARD"), f"train.activation_checkpointing={kept}")
    assert run_on(2, lean_run, tmp_path, *words) == [0, 0]
    assert_same_run(single("sinkhorn_knopp"), tmp_path)


BF16 = ("compute_precision.autocast=bf16", "optim.epochs=1", "train.OFFICIAL_EPOCH_LENGTH=3", *sharded("FULL_SHARD"))
"""Three steps in which sharded blocks and heads are gathered in bf16, which decides for KoLeo which neighbour is the
nearest: EVERYTHING has none."""


def run_recomputed(lean_run: Run, folder: Path, *words: str) -> dict[str, dict[str, Tensor]]:
    """Train on two processes, keeping all activations, some, none; return the weights."""
    found = {}
    for kept in ("none", "selective", "full"):
        # Images are dropped: in the second pass the same ones.
        words_of_one = (*EVERYTHING, *BF16, *words, f"train.activation_checkpointing={kept}")
        assert run_on(2, lean_run, folder / kept, *words_of_one) == [0, 0]
        found[kept] = weights(folder / kept)
    return found


def assert_bitwise(found: dict[str, dict[str, Tensor]]) -> None:
    for kept in ("selective", "full"):
        assert all(torch.equal(found[kept][name], tensor) for name, tensor in found["none"].items()), kept


def test_blocks_gathered_in_bf16_fail_or_recompute_something_else(tmp_path: Path, lean_run: Run) -> None:
    assert_bitwise(run_recomputed(lean_run, tmp_path))
    assert "are gathered in bf16" in (tmp_path / "none" / "logs" / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["SHARD_GRAD_OP", "FULL_SHARD"])
def test_sharded_blocks_cannot_be_compiled_in_earnest(
    strategy: str, single: Callable[[str], Path], tmp_path: Path, lean_run: Run
) -> None:
    words = (*with_centering("sinkhorn_knopp"), *sharded(strategy), "train.compile=true")
    assert run_on(2, lean_run, tmp_path, *words) == [0, 0]
    assert "blocks are compiled" in (tmp_path / "logs" / "log.txt").read_text()
    assert_same_run(single("sinkhorn_knopp"), tmp_path)


@pytest.mark.slow
def test_compiled_blocks_gathered_in_bf16_recompute_something_else(tmp_path: Path, lean_run: Run) -> None:
    assert_bitwise(run_recomputed(lean_run, tmp_path, "train.compile=true"))
    assert "blocks are compiled" in (tmp_path / "full" / "logs" / "log.txt").read_text()


def test_sharded_blocks_as_they_are_traced_make_another_run(
    single: Callable[[str], Path], tmp_path: Path, lean_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a compiler behind it: what one makes of a graph is its own affair.
    compile_in_earnest = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **kw: compile_in_earnest(module, backend="eager", **kw))
    words = (*with_centering("sinkhorn_knopp"), *sharded("SHARD_GRAD_OP"), "train.compile=true")
    assert run_on(2, lean_run, tmp_path, *words) == [0, 0]
    assert "blocks are compiled" in (tmp_path / "logs" / "log.txt").read_text()
    assert_same_run(single("sinkhorn_knopp"), tmp_path)


def test_a_machine_without_a_c_compiler_ends_a_sharded_run(
    single: Callable[[str], Path], tmp_path: Path, lean_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no_compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no_compiler"),))
    words = (*with_centering("sinkhorn_knopp"), *sharded("SHARD_GRAD_OP"), "train.compile=true")
    assert run_on(2, lean_run, tmp_path / "run", *words) == [0, 0]
    assert "No working C++ compiler found" in (tmp_path / "run" / "logs" / "log.txt").read_text()
    assert_same_run(single("sinkhorn_knopp"), tmp_path / "run")


def test_pictures_an_evaluation_and_a_save_after_one_step_wait_for_each_other(tmp_path: Path, debug_run: Run) -> None:
    words = ("train.async_checkpoint=true", "logging.pictures_every_steps=10", "evaluation.eval_period_iterations=10")
    words = (*sharded("SHARD_GRAD_OP"), EVERY_10, "train.batch_size_per_gpu=4", "logging.report=false", *words)
    assert exit_codes(launch_ranks(2, lambda: debug_run(tmp_path, *words))) == [0, 0]
    store = CheckpointStore(tmp_path / "checkpoints", read_only=True)
    assert store.steps() == [10, 20] and store.load(10).step == 10
    assert (tmp_path / "eval" / "training_9" / "teacher_checkpoint.pth").is_file()


def test_weights_that_the_main_process_cannot_read_leave_the_others_waiting(tmp_path: Path, lean_run: Run) -> None:
    damaged = tmp_path / "weights.pth"
    save_file({"cls_token": torch.zeros(1, 1, 7)}, damaged.with_suffix(".safetensors"))
    started = time.monotonic()
    words = (*sharded("SHARD_GRAD_OP"), f"student.pretrained_weights={damaged.with_suffix('.safetensors')}")
    codes = exit_codes(launch_ranks(2, lambda: lean_run(tmp_path / "run", *words)))
    assert codes == [2, 2] and time.monotonic() - started < 60


def test_a_process_that_hangs_is_waited_for_without_end(
    tmp_path: Path, lean_run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def sleepy_step(state: TrainState, *arguments: Any) -> dict[str, float]:
        if state.step == 3 and dist.get_rank() == 1:
            time.sleep(120)
        return train_step(state, *arguments)

    monkeypatch.setattr(guard, "train_step", sleepy_step)
    started = time.monotonic()
    assert run_on(2, lean_run, tmp_path, "train.watchdog_seconds=3") == [EXIT_HUNG] * 2
    assert time.monotonic() - started < 60
    stacks = [(tmp_path / "logs" / f"stacks.rank{rank}.txt").read_text() for rank in range(2)]
    assert all("nothing happened for 3 s (train.watchdog_seconds) while in step 3" in text for text in stacks)
    assert "sleepy_step" in stacks[1]
    assert "all_reduce" in stacks[0]
    shown = capfd.readouterr().err
    assert all(f"rank {rank}: nothing happened" in shown for rank in range(2))


def test_one_process_skips_a_step_that_the_others_take(
    tmp_path: Path, lean_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is not finite on one process, with gradients that are: nothing but the loss tells the others."""

    def spoiled_step(state: TrainState, *arguments: Any) -> dict[str, float]:
        if state.step != 3 or get_rank() + 1 != get_world_size():
            return train_step(state, *arguments)
        sound = state.model.forward_backward

        def spoiled(*args: Any, **kwargs: Any) -> StepOutput:
            output = sound(*args, **kwargs)
            output.losses["total_loss"].fill_(torch.nan)
            return output

        with monkeypatch.context() as patch:
            patch.setattr(state.model, "forward_backward", spoiled)
            return train_step(state, *arguments)

    monkeypatch.setattr(guard, "train_step", spoiled_step)
    words = (*with_centering("sinkhorn_knopp"), *sharded("SHARD_GRAD_OP"), "optim.epochs=1", "optim.warmup_epochs=0")
    words = (*words, "train.watchdog_seconds=20")  # a process that goes on waits for the other one
    for world_size in (1, 2):
        assert run_on(world_size, lean_run, tmp_path / str(world_size), *words) == [0] * world_size
    assert_same_run(tmp_path / "1", tmp_path / "2")
    assert read_metrics(tmp_path / "2" / "training_metrics.json")[-1]["skipped_steps"] == 1


def test_a_bundle_lacks_the_images_of_the_process_that_was_at_fault(
    tmp_path: Path, lean_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled_step(state: TrainState, batch: Batch, *arguments: Any) -> dict[str, float]:
        if state.step == 3 and dist.get_rank() == 1:
            batch.global_crops[0, 0, 0, 0] = torch.nan
        return train_step(state, batch, *arguments)

    monkeypatch.setattr(guard, "train_step", spoiled_step)
    words = (*sharded("SHARD_GRAD_OP"), NO_DROP, "train.max_nonfinite_steps=1")
    assert run_on(2, lean_run, tmp_path, *words) == [1, 1]
    replay = replay_step(tmp_path / "replay" / "step_00000004", torch.device("cpu"))
    assert replay.first_module is not None and not replay.is_finite


def test_a_bundle_of_several_processes_shows_another_step(
    tmp_path: Path, lean_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is sound but for what was said of it: run again on one process, its losses are those of both."""

    def refused_step(state: TrainState, *arguments: Any) -> dict[str, float]:
        found = train_step(state, *arguments)
        if state.step == 1:
            (tmp_path / f"losses{dist.get_rank()}.json").write_text(json.dumps(found))
            raise NonFiniteLossError("said by the test")
        return found

    monkeypatch.setattr(guard, "train_step", refused_step)
    still = ("train.centering=sinkhorn_knopp", "optim.base_lr=0", "teacher.momentum_teacher=1")  # the step had an end
    assert run_on(2, lean_run, tmp_path, *EVERYTHING, NO_DROP, *still, "train.max_nonfinite_steps=1") == [1, 1]
    replay = replay_step(tmp_path / "replay" / "step_00000002", torch.device("cpu"))
    seen = json.loads((tmp_path / "losses0.json").read_text())
    assert replay.is_finite
    # Sums in another order.
    assert replay.losses == pytest.approx({name: seen[name] for name in replay.losses}, rel=1e-5)
