"""Saving, loading, pruning and refusing, without any fault from outside."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2_equi.fsdp.checkpoint import CheckpointStore, read_checkpoint, sha256_of_tensors
from dinov2_equi.fsdp.manifest import CheckpointError


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path: Path, states: Any) -> None:
    store = CheckpointStore(tmp_path)
    states.save(store, 100)
    assert states.is_of(store.load(), 100)
    assert states.is_of(store.load(100), 100)
    assert states.is_of(read_checkpoint(tmp_path / "step_00000100"), 100)


def test_layout_is_as_documented(tmp_path: Path, states: Any) -> None:
    path = CheckpointStore(tmp_path).save(7, states.tensors(7), states.state(7))
    assert path == tmp_path / "step_00000007"
    assert names(path) == ["manifest.json", "optimizer.safetensors", "state.json", "student.safetensors"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.empty(0, 4),
        torch.arange(6, dtype=torch.int64).reshape(2, 3),
        torch.tensor([True, False]),
        torch.randn(4, dtype=torch.float64),
        torch.randn(3, 2).to(torch.bfloat16),
        torch.randn(3, 2).half(),
        torch.tensor([float("nan"), float("inf"), -0.0]),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0)[2:5],
        torch.zeros(1).expand(4),
        torch.get_rng_state(),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_every_kind_of_tensor_survives(tmp_path: Path, tensor: torch.Tensor) -> None:
    store = CheckpointStore(tmp_path)
    store.save(0, {"t": {"x": tensor}}, {})
    loaded = store.load().tensors["t"]
    assert loaded["x"].dtype == tensor.dtype
    assert sha256_of_tensors(loaded) == sha256_of_tensors({"x": tensor})


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    store = CheckpointStore(tmp_path)
    store.save(0, {"t": {"a": shared, "b": shared, "c": shared[2:], "d": shared.view(2, 3)}}, {})
    loaded = store.load().tensors["t"]
    assert loaded["b"].tolist() == shared.tolist()
    assert loaded["c"].tolist() == shared[2:].tolist()
    assert loaded["d"].shape == (2, 3)


def test_parameters_with_gradient_are_saved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(0, {"t": dict(torch.nn.Linear(2, 3).named_parameters())}, {})
    assert not store.load().tensors["t"]["weight"].requires_grad


def test_loaded_tensors_outlive_their_checkpoint(tmp_path: Path, states: Any) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    states.save(store, 1)
    first = store.load()
    states.save(store, 2)
    assert store.steps() == [2]
    assert states.is_of(first, 1)


def test_no_pickle_in_any_file(tmp_path: Path, states: Any) -> None:
    path = CheckpointStore(tmp_path).save(1, states.tensors(1), states.state(1))
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    assert not any(file.read_bytes().startswith((b"\x80", b"PK")) for file in path.iterdir())


@pytest.mark.parametrize(("keep", "kept"), [(1, [50]), (2, [40, 50]), (3, [30, 40, 50]), (9, [10, 20, 30, 40, 50])])
def test_only_the_newest_are_kept(tmp_path: Path, states: Any, keep: int, kept: list[int]) -> None:
    store = CheckpointStore(tmp_path, keep)
    states.save(store, 10, 20, 30, 40, 50)
    assert store.steps() == kept
    assert names(tmp_path) == [f"step_{step:08d}" for step in kept]
    assert store.latest_step() == 50


def test_pruning_goes_on_after_a_resume(tmp_path: Path, states: Any) -> None:
    states.save(CheckpointStore(tmp_path, 2), 10, 20)
    states.save(CheckpointStore(tmp_path, 2), 30)
    assert CheckpointStore(tmp_path, 2).steps() == [20, 30]


def test_steps_are_ordered_as_numbers(tmp_path: Path, states: Any) -> None:
    store = CheckpointStore(tmp_path)
    states.save(store, 99_999_999, 100_000_000)
    assert store.steps() == [99_999_999, 100_000_000]
    assert states.is_of(store.load(), 100_000_000)


def test_saving_a_step_again_replaces_it(tmp_path: Path, states: Any) -> None:
    store = CheckpointStore(tmp_path)
    store.save(5, {"t": {"x": torch.zeros(2)}}, {"try": 1})
    states.save(store, 5)
    assert states.is_of(store.load(), 5)
    assert names(tmp_path) == ["step_00000005"]


def test_the_checkpoint_just_saved_is_never_pruned(
    tmp_path: Path, states: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    states.save(store, 200)
    states.save(store, 100)
    assert store.steps() == [100, 200]
    assert "later steps [200]" in caplog.text


def test_an_old_one_that_cannot_be_removed_does_not_fail_the_save(
    tmp_path: Path, states: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    states.save(store, 1)

    def refuse(path: Path, target: Path) -> None:
        if ".pruned" in target.name:
            raise PermissionError("not allowed")
        path.replace(target)

    monkeypatch.setattr(Path, "rename", refuse)
    states.save(store, 2)
    assert states.is_of(store.load(), 2)
    assert "could not be removed: not allowed" in caplog.text


def test_foreign_files_are_neither_taken_nor_touched(tmp_path: Path, states: Any) -> None:
    foreign = ["step_1", "step_000000007", "step_00000009.bak", "notes.txt", "step_abcdefgh", "xstep_00000003"]
    for name in foreign:
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000011").write_text("a file")
    store = CheckpointStore(tmp_path, keep=1)
    assert store.latest_step() is None
    states.save(store, 2)
    assert store.steps() == [2]
    assert set(foreign) < set(names(tmp_path))


def test_leftovers_of_a_crash_are_removed_on_start(tmp_path: Path, states: Any) -> None:
    states.save(CheckpointStore(tmp_path), 1)
    for name in (".partial-step_00000002", ".pruned-step_00000000", ".replaced-step_00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "student.safetensors").write_bytes(b"half")
    store = CheckpointStore(tmp_path)
    assert names(tmp_path) == ["step_00000001"]
    assert states.is_of(store.load(), 1)


def test_a_checkpoint_set_aside_is_put_back_if_its_successor_never_came(tmp_path: Path, states: Any) -> None:
    path = CheckpointStore(tmp_path).save(1, states.tensors(1), states.state(1))
    path.rename(tmp_path / ".replaced-step_00000001")
    assert states.is_of(CheckpointStore(tmp_path).load(), 1)


def test_a_half_removed_one_is_not_put_back(tmp_path: Path, states: Any) -> None:
    path = CheckpointStore(tmp_path).save(1, states.tensors(1), states.state(1))
    (path / "student.safetensors").unlink()
    path.rename(tmp_path / ".replaced-step_00000001")
    assert CheckpointStore(tmp_path).steps() == []


def test_a_reader_does_not_disturb_a_run_that_is_saving(tmp_path: Path, states: Any) -> None:
    states.save(CheckpointStore(tmp_path), 1)
    (tmp_path / ".partial-step_00000002").mkdir()
    reader = CheckpointStore(tmp_path, read_only=True)
    assert states.is_of(reader.load(), 1)
    assert (tmp_path / ".partial-step_00000002").is_dir()
    with pytest.raises(CheckpointError, match="read-only"):
        reader.save(2, {}, {})


def test_a_reader_makes_no_directory(tmp_path: Path) -> None:
    reader = CheckpointStore(tmp_path / "absent", read_only=True)
    assert reader.latest_step() is None
    assert not (tmp_path / "absent").exists()
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        reader.load()


def test_a_missing_step_names_those_that_exist(tmp_path: Path, states: Any) -> None:
    store = CheckpointStore(tmp_path)
    states.save(store, 10, 20)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 15 .*\[10, 20\]"):
        store.load(15)


@pytest.mark.parametrize("name", ["", "../evil", "a/b", "/etc/x", "a.safetensors", ".hidden", "a b", "-x", "a\x00"])
def test_names_that_are_paths_are_refused(tmp_path: Path, name: str) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(ValueError, match="without a file ending"):
        store.save(0, {name: {}}, {})
    assert names(tmp_path) == []


def test_senseless_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1 checkpoint, got 0"):
        CheckpointStore(tmp_path, 0)
    store = CheckpointStore(tmp_path)
    with pytest.raises(ValueError, match="step >= 0, got -1"):
        store.save(-1, {}, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.save(1, {}, {"path": Path("x")})
    assert names(tmp_path) == []


def test_hash_sees_every_bit_name_shape_and_dtype() -> None:
    base = {"a": torch.tensor([0.0, 1.0]), "b": torch.zeros(2, 1)}
    variants = [
        base,
        {"a": torch.tensor([-0.0, 1.0]), "b": base["b"]},
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"], "b": torch.zeros(1, 2)},
        {"a": base["a"], "b": torch.zeros(2, 1, dtype=torch.int32)},
        {"a": base["a"]},
        {},
    ]
    assert len({sha256_of_tensors(variant) for variant in variants}) == len(variants)


def test_hash_ignores_order_and_memory_layout() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert sha256_of_tensors({"a": matrix, "b": matrix}) == sha256_of_tensors(
        {"b": matrix.t().contiguous().t(), "a": matrix}
    )


def test_damaged_newest_is_named_and_the_one_before_used(
    tmp_path: Path, states: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    states.save(store, 1, 2, 3)
    (tmp_path / "step_00000003" / "student.safetensors").write_bytes(b"")
    (tmp_path / "step_00000002" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert states.is_of(store.load(), 1)
    assert "step_00000003 is damaged: student.safetensors has 0 bytes" in caplog.text
    assert "step_00000002 is damaged: manifest.json is missing" in caplog.text


def test_a_damaged_one_asked_for_by_step_is_an_error(tmp_path: Path, states: Any) -> None:
    store = CheckpointStore(tmp_path)
    states.save(store, 1, 2)
    (tmp_path / "step_00000002" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step_00000002 is damaged: state.json has 2 bytes"):
        store.load(2)


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path, states: Any) -> None:
    store = CheckpointStore(tmp_path)
    states.save(store, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step_0000000{step}" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no usable checkpoint .*step_00000002 .*step_00000001 "):
        store.load()


def test_a_run_that_went_back_past_a_damaged_one_replaces_it(tmp_path: Path, states: Any) -> None:
    store = CheckpointStore(tmp_path)
    states.save(store, 1, 2)
    (tmp_path / "step_00000002" / "state.json").write_text("{}")
    assert store.load().step == 1
    states.save(store, 2)
    assert states.is_of(store.load(), 2)
