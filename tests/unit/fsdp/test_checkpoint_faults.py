"""Kills, failing system calls and full disks at every point of a save; damage of every kind on the disk."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dinov2_equi.fsdp import checkpoint as checkpoint_module
from dinov2_equi.fsdp import manifest as manifest_module
from dinov2_equi.fsdp.checkpoint import CheckpointStore, read_checkpoint
from dinov2_equi.fsdp.manifest import CheckpointError, FileEntry, Manifest, describe_file, parse_manifest

STEPPED_CALLS = ("mkdir", "rename", "unlink", "rmdir", "fsync", "close")


@pytest.fixture(autouse=True)
def quick_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the real flush: a killed process loses nothing that the kernel has, only a power cut does."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Killed(BaseException):
    """The process is gone: no handler may do anything more to the disk."""


class FaultyDisk:
    """Counts the calls that change the disk; from the chosen one on nothing works (kill) or just that one fails.

    ``when`` is "before" (the call does not happen), "after" (it happens, then the fault comes) or, for the files of
    tensors and text, "half" (a part of the bytes arrives).
    """

    def __init__(self, fatal_call: int, when: str, fault: BaseException) -> None:
        self.calls = 0
        self.struck = False
        self._fatal_call = fatal_call
        self._when = when
        self._fault = fault

    def wrap(self, call: Callable[..., Any], half: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.struck and isinstance(self._fault, Killed):
                raise self._fault
            self.calls += 1
            if self.calls != self._fatal_call:
                return call(*args, **kwargs)
            self.struck = True
            if self._when == "after":
                call(*args, **kwargs)
            elif self._when == "half" and half is not None:
                half(*args, **kwargs)
            raise self._fault

        return wrapped


def half_save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path)
    os.truncate(path, path.stat().st_size // 2)


def half_write_text(path: Path, text: str) -> None:
    path.write_bytes(text.encode()[: len(text) // 2])


@contextmanager
def faulty_disk(fatal_call: int, when: str, fault: BaseException) -> Iterator[FaultyDisk]:
    disk = FaultyDisk(fatal_call, when, fault)
    with pytest.MonkeyPatch.context() as patch:
        for name in STEPPED_CALLS:
            patch.setattr(os, name, disk.wrap(getattr(os, name)))
        patch.setattr(checkpoint_module, "save_file", disk.wrap(save_file, half_save_file))
        write_text = checkpoint_module._write_text
        patch.setattr(checkpoint_module, "_write_text", disk.wrap(write_text, half_write_text))
        yield disk


def saved_step(directory: Path, states: Any, allowed: tuple[int, ...]) -> int:
    """Open the directory as a restarted run would and return the step it finds, which is one of ``allowed``."""
    store = CheckpointStore(directory, keep=1)
    found = store.load()
    assert found.step in allowed
    assert states.is_of(found, found.step)
    assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []
    states.save(store, 9)  # the run can go on
    assert states.is_of(CheckpointStore(directory, keep=1).load(), 9)
    return found.step


def enumerate_faults(tmp_path: Path, states: Any, fault: BaseException, when: str, new_step: int) -> list[int]:
    """Let every call of one save fail once; return the step found afterwards, one for each call."""
    found: list[int] = []
    for fatal_call in range(1, 200):
        directory = tmp_path / str(fatal_call)
        store = CheckpointStore(directory, keep=1)
        states.save(store, 1)
        with faulty_disk(fatal_call, when, fault) as disk:
            try:
                states.save(store, new_step)
            except (Killed, CheckpointError):
                assert disk.struck
        if not disk.struck:
            return found
        if isinstance(fault, OSError):
            after = store.load()  # the same process goes on
            assert states.is_of(after, after.step)
        found.append(saved_step(directory, states, (1, new_step)))
    raise AssertionError("a save takes fewer than 200 calls")


@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_a_kill_at_any_point_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, states: Any, when: str) -> None:
    found = enumerate_faults(tmp_path, states, Killed(), when, new_step=2)
    assert len(found) > 15, "the enumeration has to reach the calls of the pruning"
    assert found == sorted(found), "once the new checkpoint is there it stays"
    assert set(found) == {1, 2}


@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_a_kill_while_a_step_is_replaced_leaves_a_whole_checkpoint(tmp_path: Path, states: Any, when: str) -> None:
    found = enumerate_faults(tmp_path, states, Killed(), when, new_step=1)
    assert len(found) > 15
    assert set(found) == {1}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("new_step", [1, 2])
def test_any_failing_call_leaves_a_whole_checkpoint(tmp_path: Path, states: Any, code: int, new_step: int) -> None:
    found = enumerate_faults(tmp_path, states, OSError(code, os.strerror(code)), "before", new_step)
    assert len(found) > 15


@pytest.mark.parametrize("new_step", [1, 2])
def test_a_failed_save_is_reported_and_the_next_one_works(tmp_path: Path, states: Any, new_step: int) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    states.save(store, 1)
    with (
        faulty_disk(1, "before", OSError(errno.ENOSPC, "No space left on device")),
        pytest.raises(CheckpointError, match=f"step {new_step} could not be written .*No space left.*make room"),
    ):
        states.save(store, new_step)
    assert states.is_of(store.load(), 1)
    states.save(store, new_step)
    assert states.is_of(store.load(), new_step)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to name what is flushed")
def test_everything_is_flushed_before_it_gets_its_name(
    tmp_path: Path, states: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def record_fsync(descriptor: int) -> None:
        events.append(f"flush {Path(f'/proc/self/fd/{descriptor}').readlink().relative_to(tmp_path.parent)}")

    def record_rename(path: Path, target: Path) -> None:
        events.append(f"rename to {target.relative_to(tmp_path.parent)}")
        path.replace(target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    states.save(CheckpointStore(tmp_path), 2)
    partial = f"{tmp_path.name}/.partial-step_00000002"
    files = ["student.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
    assert events == [
        *(f"flush {partial}/{name}" for name in files),
        f"flush {partial}",
        f"rename to {tmp_path.name}/step_00000002",
        f"flush {tmp_path.name}",
    ]


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Let every write beyond ``limit_bytes`` of a file fail in the kernel, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit_bytes", [0, 100, 4096])
def test_a_write_that_the_kernel_refuses_is_a_clear_error(tmp_path: Path, states: Any, limit_bytes: int) -> None:
    store = CheckpointStore(tmp_path)
    states.save(store, 1)
    with file_size_limit(limit_bytes), pytest.raises(CheckpointError, match="step 2 could not be written"):
        store.save(2, {"t": {"x": torch.zeros(10_000)}}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"], "the space of the failed one is freed"
    assert states.is_of(store.load(), 1)


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)


@pytest.fixture
def saved(tmp_path: Path, states: Any) -> Path:
    return CheckpointStore(tmp_path / "run").save(3, states.tensors(3), states.state(3))


# Nine bits on lies the next bit of the next byte; a stride of 1 is exhaustive.
@pytest.mark.parametrize("stride_bits", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "student.safetensors", "optimizer.safetensors"])
def test_every_flipped_bit_is_noticed(saved: Path, name: str, stride_bits: int) -> None:
    num_bits = 8 * (saved / name).stat().st_size
    for bit in range(0, num_bits, stride_bits):
        flip_bit(saved / name, bit)
        with pytest.raises(CheckpointError):
            read_checkpoint(saved)
        flip_bit(saved / name, bit)
    assert read_checkpoint(saved).step == 3


def test_every_truncation_is_noticed(saved: Path) -> None:
    for path in sorted(saved.iterdir()):
        content = path.read_bytes()
        for size in range(0, len(content), 7):
            path.write_bytes(content[:size])
            with pytest.raises(CheckpointError):
                read_checkpoint(saved)
        path.write_bytes(content + b"\n")
        with pytest.raises(CheckpointError):
            read_checkpoint(saved)
        path.write_bytes(content)
    assert read_checkpoint(saved).step == 3


def test_random_overwrites_are_noticed(saved: Path) -> None:
    rng = random.Random(0)
    originals = {path: path.read_bytes() for path in saved.iterdir()}
    for _ in range(500):
        path = rng.choice(sorted(originals))
        content = bytearray(originals[path])
        start = rng.randrange(len(content))
        noise = rng.randbytes(rng.randint(1, 40))
        content[start : start + len(noise)] = noise
        path.write_bytes(content)
        if bytes(content) != originals[path]:
            with pytest.raises(CheckpointError):
                read_checkpoint(saved)
        path.write_bytes(originals[path])


def test_a_missing_file_is_named(saved: Path) -> None:
    (saved / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is missing"):
        read_checkpoint(saved)


def test_a_checkpoint_under_the_name_of_another_step_is_noticed(saved: Path) -> None:
    other = saved.rename(saved.with_name("step_00000004"))
    with pytest.raises(CheckpointError, match="is of step 3"):
        read_checkpoint(other)


def test_files_of_two_checkpoints_do_not_mix(tmp_path: Path, states: Any) -> None:
    store = CheckpointStore(tmp_path)
    states.save(store, 1, 2)
    shutil.copy(tmp_path / "step_00000001/student.safetensors", tmp_path / "step_00000002/student.safetensors")
    with pytest.raises(CheckpointError, match="student.safetensors has SHA-256"):
        store.load(2)


def rewrite_manifest(directory: Path, **files: FileEntry) -> None:
    manifest = parse_manifest((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(Manifest(manifest.step, {**manifest.files, **files}).to_text())


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        ".safetensors",
        "x.pth",
        "x.pkl",
        "manifest.json",
    ],
)
def test_a_manifest_cannot_name_files_outside_its_directory(saved: Path, name: str) -> None:
    save_file({"x": torch.zeros(1)}, saved.parent / "secret.safetensors")
    rewrite_manifest(saved, **{name: describe_file(saved.parent / "secret.safetensors")})
    with pytest.raises(CheckpointError, match="is not a file of a checkpoint"):
        read_checkpoint(saved)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
@pytest.mark.parametrize("name", ["student.safetensors", "manifest.json"])
def test_links_pipes_and_directories_are_refused_without_hanging(saved: Path, kind: str, name: str) -> None:
    original = (saved / name).rename(saved.parent / "original")
    if kind == "link":
        (saved / name).symlink_to(original)
    elif kind == "pipe":
        os.mkfifo(saved / name)
    else:
        (saved / name).mkdir()
    with pytest.raises(CheckpointError, match=f"expected {name} to be a plain file"):
        read_checkpoint(saved)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "[" * 100_000,
        '{"format_version": 1}',
        '{"format_version": 1, "step": "3", "files": {}}',
        '{"format_version": 1, "step": 3, "files": []}',
        '{"format_version": 1, "step": 3, "files": {}}',
        '{"format_version": 1, "step": 3, "files": {"state.json": 4}}',
        '{"format_version": 1, "step": 3, "files": {"state.json": {"size": 4}}}',
        '{"format_version": 1, "step": 3, "files": {"state.json": {"size": 4, "sha256": "ABC"}}}',
    ],
    ids=lambda text: text[:60],
)
def test_hostile_manifests_are_refused(saved: Path, text: str) -> None:
    (saved / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="step_00000003 is damaged"):
        read_checkpoint(saved)


def test_another_format_version_is_explained(saved: Path) -> None:
    path = saved / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CheckpointError, match="format version 2, this code reads 1.*another version of this package"):
        read_checkpoint(saved)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0{not json"])
def test_bytes_that_are_no_safetensors_are_refused_even_with_a_fitting_manifest(saved: Path, content: bytes) -> None:
    (saved / "student.safetensors").write_bytes(content)
    rewrite_manifest(saved, **{"student.safetensors": describe_file(saved / "student.safetensors")})
    with pytest.raises(CheckpointError, match="step_00000003 is damaged"):
        read_checkpoint(saved)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\ud800", "[]", "3"])
def test_a_state_that_is_no_json_is_refused_even_with_a_fitting_manifest(saved: Path, text: str) -> None:
    (saved / "state.json").write_bytes(text.encode(errors="surrogatepass"))
    rewrite_manifest(saved, **{"state.json": describe_file(saved / "state.json")})
    with pytest.raises(CheckpointError, match="step_00000003 is damaged"):
        read_checkpoint(saved)


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_a_json_file_of_any_size_is_read_into_memory(saved: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "MAX_JSON_BYTES", 1 << 20)
    os.truncate(saved / name, (1 << 20) + 1)
    if name == "state.json":
        rewrite_manifest(saved, **{name: describe_file(saved / name)})
    with pytest.raises(CheckpointError, match=f"{name} has 1048577 bytes, a checkpoint's has at most 1048576"):
        read_checkpoint(saved)


def test_a_state_is_saved_that_cannot_be_read_again(
    tmp_path: Path, states: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "MAX_JSON_BYTES", 1 << 10)
    store = CheckpointStore(tmp_path)
    states.save(store, 1)
    with pytest.raises(CheckpointError, match=r"state\.json has"):
        store.save(2, states.tensors(2), {"long": "x" * 2000})
    assert states.is_of(store.load(), 1)


def test_manifest_text_is_stable_json() -> None:
    entries = {"b.safetensors": FileEntry(2, "0" * 64), "a.safetensors": FileEntry(1, "1" * 64)}
    text = Manifest(7, entries | {"state.json": FileEntry(3, "2" * 64)}).to_text()
    assert list(json.loads(text)["files"]) == ["a.safetensors", "b.safetensors", "state.json"]
    assert parse_manifest(text).to_text() == text
