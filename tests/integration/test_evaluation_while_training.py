"""The teacher is measured while it trains, the best is kept, and nothing of it reaches the training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dinov2_equi.fsdp.checkpoint import sha256_of_tensors
from dinov2_equi.logging.metrics import read_metrics
from dinov2_equi.run import evaluate, evaluation_hook

Run = Callable[..., int]
EVERY_TWO = ("evaluation.eval_period_iterations=2", "train.OFFICIAL_EPOCH_LENGTH=4", "optim.epochs=1")
LAST = Path("checkpoints", "step_00000004", "model.safetensors")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two classes, dark and bright noise."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, low in (("bright", 140), ("dark", 0)):
        (root / label).mkdir()
        for number in range(20):
            pixels = rng.integers(low, low + 100, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number}.png")
    return root


def evaluations(run: Path) -> list[dict[str, float]]:
    return read_metrics(run / "evaluation_metrics.json")


def best(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "best" / "best.json").read_text())
    return record


def test_teacher_is_not_measured_at_every_period(tmp_path: Path, lean_run: Run, photos: Path) -> None:
    assert lean_run(tmp_path, *EVERY_TWO, f"train.dataset_path={photos}") == 0
    found = evaluations(tmp_path)
    assert [line["iteration"] for line in found] == [1, 3]
    for line in found:
        assert set(line) == {"iteration", "eval/knn", "eval/linear", "eval/r2_rotation", "eval/seconds"}
        assert 0 <= line["eval/knn"] <= 1 and 0 <= line["eval/linear"] <= 1
    assert not (tmp_path / "best").exists()
    assert (tmp_path / "eval" / "training_1" / "teacher_checkpoint.pth").is_file()


def test_measuring_changes_what_is_learned(tmp_path: Path, lean_run: Run, photos: Path) -> None:
    hashes = []
    for period in (0, 1):
        run = tmp_path / str(period)
        words = (*EVERY_TWO, f"evaluation.eval_period_iterations={period}", f"train.dataset_path={photos}")
        assert lean_run(run, *words, "student.drop_path_rate=0.5") == 0
        hashes.append(sha256_of_tensors(load_file(run / LAST)))
    assert hashes[0] == hashes[1]


def test_other_labelled_images_than_those_named_are_used(tmp_path: Path, lean_run: Run, photos: Path) -> None:
    named = (f"evaluation.train_dataset_path={photos}", f"evaluation.val_dataset_path={photos}")
    assert lean_run(tmp_path, *EVERY_TWO, *named, "evaluation.tasks=[knn]", "evaluation.max_images=10") == 0
    assert all(set(line) == {"iteration", "eval/knn", "eval/seconds"} for line in evaluations(tmp_path))


def test_images_without_classes_stop_the_training_or_are_classified(
    tmp_path: Path, lean_run: Run, photos: Path
) -> None:
    assert lean_run(tmp_path, *EVERY_TWO, f"train.dataset_path={photos / 'dark'}") == 0
    assert all(set(line) == {"iteration", "eval/r2_rotation", "eval/seconds"} for line in evaluations(tmp_path))


def test_failed_evaluation_stops_the_training_or_the_others(
    tmp_path: Path, lean_run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no memory left for it")

    monkeypatch.setattr(evaluation_hook, "computed_features", fail)
    assert lean_run(tmp_path, *EVERY_TWO, f"train.dataset_path={photos}") == 0
    assert all("eval/r2_rotation" in line and "eval/knn" not in line for line in evaluations(tmp_path))
    log = (tmp_path / "logs" / "log.txt").read_text()
    assert "evaluation 'classification' after step 2 failed, the training goes on: no memory left for it" in log


def test_worse_teacher_replaces_the_best(
    tmp_path: Path, lean_run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.5, 0.7, 0.6, 0.7])
    monkeypatch.setattr(
        evaluation_hook, "_measurements", lambda *arguments: {"fake": lambda model: {"knn": next(values)}}
    )
    words = ("evaluation.eval_period_iterations=1", "evaluation.best_metric=knn", f"train.dataset_path={photos}")
    assert lean_run(tmp_path, *EVERY_TWO, *words) == 0
    assert best(tmp_path) == {"metric": "knn", "value": 0.7, "step": 2, "folder": "step_00000002"}
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["best.json", "step_00000002"]
    kept = torch.load(tmp_path / "best" / "step_00000002" / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    exported = torch.load(tmp_path / "eval" / "training_1" / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert all(torch.equal(kept[name], exported[name]) for name in exported)


def test_resumed_run_holds_an_evaluation_twice(
    tmp_path: Path, lean_run: Run, photos: Path, stop_before: Callable[[int | None], None]
) -> None:
    words = (*EVERY_TWO, f"train.dataset_path={photos}", "train.checkpoint_every_steps=1", "evaluation.tasks=[knn]")
    stop_before(3)
    assert lean_run(tmp_path, *words) == 130
    stop_before(None)
    assert lean_run(tmp_path, *words) == 0
    assert [line["iteration"] for line in evaluations(tmp_path)] == [1, 3]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("evaluation.tasks=[knn,depth]",), ("evaluation.tasks", "'depth'", "knn, linear, equivariance")),
        (("evaluation.best_metric=accuracy",), ("evaluation.best_metric", "r2_rotation")),
        (("evaluation.eval_period_iterations=1", "evaluation.val_dataset_path=no/where"), ("no such folder", "no")),
    ],
)
def test_wrong_setting_is_noticed_after_the_training(
    tmp_path: Path, lean_run: Run, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    assert lean_run(tmp_path, *words) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts)
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())


# ---------------------------------------------------------------------------------------------------- as a separate job


def test_separate_job_finds_other_numbers_or_measures_a_teacher_twice(
    tmp_path: Path, lean_run: Run, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*EVERY_TWO, f"train.dataset_path={photos}", "evaluation.best_metric=knn", "train.device=cpu")
    assert lean_run(tmp_path / "inside", *words) == 0
    assert lean_run(tmp_path / "beside", *words, "evaluation.in_process=false") == 0
    assert not (tmp_path / "beside" / "evaluation_metrics.json").exists()
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "beside")]) == 0
    assert "2 teachers measured" in capsys.readouterr().out

    def numbers(name: str) -> list[dict[str, float]]:
        return [{k: v for k, v in line.items() if k != "eval/seconds"} for line in evaluations(tmp_path / name)]

    assert numbers("beside") == numbers("inside")
    assert best(tmp_path / "beside") == best(tmp_path / "inside")
    assert evaluate.main([str(tmp_path / "beside"), "--follow"]) == 0  # and ends, since the last one is there
    assert "0 teachers measured" in capsys.readouterr().out
    assert numbers("beside") == numbers("inside")


def test_teacher_that_comes_later_is_not_waited_for(
    tmp_path: Path, lean_run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*EVERY_TWO, f"train.dataset_path={photos}", "evaluation.in_process=false", "train.device=cpu")
    assert lean_run(tmp_path, *words) == 0
    late = tmp_path / "eval" / "training_3"
    late.rename(tmp_path / "hidden")
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        assert [line["iteration"] for line in evaluations(tmp_path)] == [1]
        (tmp_path / "hidden").rename(late)

    monkeypatch.setattr("dinov2_equi.run.evaluate.time.sleep", sleep)
    arguments = [str(tmp_path), "--follow", "--poll-seconds", "7", "evaluation.tasks=[knn]"]
    assert evaluate.main(arguments) == 0
    assert waited == [7.0]
    assert [line["iteration"] for line in evaluations(tmp_path)] == [1, 3]


def test_failed_measurement_of_a_job_ends_well(
    tmp_path: Path, lean_run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*EVERY_TWO, f"train.dataset_path={photos}", "evaluation.in_process=false", "train.device=cpu")
    assert lean_run(tmp_path, *words) == 0

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no memory left for it")

    monkeypatch.setattr(evaluation_hook, "run_probe", fail)
    assert evaluate.main([str(tmp_path)]) == 1
    assert all("eval/r2_rotation" not in line and "eval/knn" in line for line in evaluations(tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "exports no teacher on its way"),
        (("evaluation.eval_period_iterations=1", "evaluation.tasks=[]"), "nothing of evaluation.tasks=[] can be"),
        (("evaluation.task=[knn]",), "evaluation.tasks"),
    ],
)
def test_job_without_work_gives_a_traceback_or_waits(
    finished_run: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert evaluate.main([str(finished_run), "--follow", *words]) == 2
    assert message in capsys.readouterr().err
    assert evaluate.main([str(finished_run / "eval"), "--follow"]) == 2
    assert "is no run: it holds no config.yaml" in capsys.readouterr().err
