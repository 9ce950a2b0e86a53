"""Files made to run code, to exhaust memory or to be taken for weights, given to everything that reads a checkpoint."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import struct
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.fault_campaigns.outcome import Outcome
from benchmarks.fault_campaigns.small_run import SmallRun
from dinov2_equi.fsdp.checkpoint import CheckpointStore, read_checkpoint
from dinov2_equi.fsdp.manifest import (
    MANIFEST_NAME,
    STATE_NAME,
    CheckpointError,
    FileEntry,
    Manifest,
    describe_file,
    parse_manifest,
)
from dinov2_equi.models.weights import load_exact, read_state_dict
from dinov2_equi.train.replay import CONFIG, FOLDER, replay_step
from dinov2_equi.train.state import check_same_run

MIB = 2**20
_MOST_MEMORY_BYTES = 256 * MIB
"""What reading may take above what the process holds; the bombs are larger, every real file here is much smaller."""
_ADDRESS_SPACE_BYTES = 2048 * MIB
_BOMB_BYTES = 512 * MIB
_TIMEOUT_SECONDS = 30.0
_REFUSED, _ACCEPTED, _OTHER_ERROR = 0, 10, 11

Reader = Callable[[Path], object]


@dataclass(frozen=True)
class Target:
    """What a hostile file is made of, in a folder of its own.

    Attributes:
        folder: nothing else is in it.
        checkpoint: a sound checkpoint of the run, to be spoiled.
        canary: a file that exists only if something was executed.
    """

    folder: Path
    checkpoint: Path
    canary: Path

    def rewrite_manifest(self, **files: FileEntry) -> Path:
        """Let the manifest fit what the files have become, with `files` besides; return the checkpoint."""
        path = self.checkpoint / MANIFEST_NAME
        manifest = parse_manifest(path.read_text(encoding="utf-8"))
        described = {name: describe_file(self.checkpoint / name) for name in manifest.files}
        path.write_text(Manifest(manifest.step, described | files).to_text(), encoding="utf-8")
        return self.checkpoint

    def with_file(self, name: str, content: bytes) -> Path:
        """Replace a file of the checkpoint, its manifest fitting; return the checkpoint."""
        (self.checkpoint / name).write_bytes(content)
        return self.rewrite_manifest()

    def with_tensors(self, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        """Change the tensors of a file of the checkpoint, its manifest fitting; return the checkpoint."""
        tensors = dict(read_checkpoint(self.checkpoint).tensors[name])
        change(tensors)
        save_file(tensors, self.checkpoint / f"{name}.safetensors")
        return self.rewrite_manifest()

    def with_state(self, change: Callable[[dict[str, Any]], object]) -> Path:
        """Change the JSON values of the checkpoint, its manifest fitting; return the checkpoint."""
        state = json.loads((self.checkpoint / STATE_NAME).read_text(encoding="utf-8"))
        changed = change(state)
        return self.with_file(STATE_NAME, json.dumps(state if changed is None else changed).encode())

    def without(self, key: str) -> Path:
        """Remove one JSON value from the checkpoint, its manifest fitting; return the checkpoint."""
        return self.with_state(lambda state: {name: value for name, value in state.items() if name != key})

    def file(self, name: str, content: bytes) -> Path:
        """Write a weight file and return its path."""
        path = self.folder / name
        path.write_bytes(content)
        return path


class _Executes:
    """Pickles to a call that makes the canary."""

    def __init__(self, canary: Path, how: str) -> None:
        self._canary, self._how = canary, how

    def __reduce__(self) -> tuple[Any, ...]:
        if self._how == "system":
            return os.system, (f"touch {self._canary}",)
        if self._how == "eval":
            return eval, (f"open({str(self._canary)!r}, 'w').close()",)
        return open, (str(self._canary), "w")


def _header(entries: Mapping[str, Any], data: bytes = b"") -> bytes:
    """Return a safetensors file with this header."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(dtype: str = "F32", shape: tuple[int, ...] = (1,), offsets: tuple[int, int] = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


_SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "empty file": lambda: b"",
    "shorter than the length of its header": lambda: b"\x01\x00",
    "header of 2^63 bytes": lambda: struct.pack("<Q", 2**63) + b"{}",
    "header of 2^64 - 1 bytes": lambda: b"\xff" * 8 + b"{}",
    "header of 90 MB that is not there": lambda: struct.pack("<Q", 90_000_000) + b"{}",
    "header that is no JSON": lambda: struct.pack("<Q", 4) + b"{not",
    "header nested 100,000 deep": lambda: struct.pack("<Q", 100_000) + b"[" * 100_000,
    "header that is no UTF-8": lambda: struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe",
    "tensor beyond the end": lambda: _header({"x": _entry(shape=(1000,), offsets=(0, 4000))}, b"\0" * 4),
    "tensor of 2^62 numbers": lambda: _header({"x": _entry(shape=(2**31, 2**31), offsets=(0, 4))}, b"\0" * 4),
    "shape whose product overflows": lambda: _header({"x": _entry(shape=(2**32, 2**32), offsets=(0, 0))}),
    "offsets that run backwards": lambda: _header({"x": _entry(offsets=(4, 0))}, b"\0" * 4),
    "negative shape": lambda: _header({"x": _entry(shape=(-1,))}, b"\0" * 4),
    "overlapping tensors": lambda: _header({"x": _entry(), "y": _entry()}, b"\0" * 4),
    "unknown dtype": lambda: _header({"x": _entry(dtype="OBJECT")}, b"\0" * 4),
    "bytes left over": lambda: _header({"x": _entry()}, b"\0" * 64),
    "pickle under the name safetensors": lambda: pickle.dumps({"x": 1}),
}


def _weights_safetensors(make: Callable[[], bytes]) -> Callable[[Target], Path]:
    return lambda target: target.file("weights.safetensors", make())


def _checkpoint_safetensors(make: Callable[[], bytes]) -> Callable[[Target], Path]:
    return lambda target: target.with_file("model.safetensors", make())


def _torch_file(how: str, *, legacy: bool) -> Callable[[Target], Path]:
    def make(target: Target) -> Path:
        path = target.folder / "weights.pth"
        content = {"teacher": {"x": torch.zeros(1), "y": _Executes(target.canary, how)}}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        return path

    return make


def _raw_pickle(how: str, protocol: int) -> Callable[[Target], Path]:
    return lambda target: target.file("weights.pth", pickle.dumps(_Executes(target.canary, how), protocol))


def _zip_bomb(path: Path, num_bytes: int, *, member: str) -> Path:
    """Rewrite a file of torch.save with one member swollen to so many zeros, which take a thousandth when packed."""
    torch.save({"x": torch.zeros(num_bytes // 4 if member.endswith("data/0") else 1)[:1].clone()}, path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    (swollen,) = (name for name in members if name.endswith(member))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            if name != swollen:
                archive.writestr(name, content)
                continue
            with archive.open(name, "w") as file:
                file.write(content)
                for _ in range(num_bytes // MIB):
                    file.write(bytes(MIB))
    return path


def _huge_claim(target: Target) -> Path:
    """Return a file of a few bytes whose pickle claims a tensor of 4 TiB."""
    path = target.folder / "weights.pth"
    torch.save({"x": torch.zeros(1).expand(2**40)}, path)
    return path


def _nested_zip_names(target: Target) -> Path:
    path = target.folder / "weights.pth"
    torch.save({"x": torch.zeros(1)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../../" + str(target.canary).lstrip("/"), b"executed")
    return path


WEIGHT_FILES: dict[str, Callable[[Target], Path]] = {
    **{f"safetensors: {name}": _weights_safetensors(make) for name, make in _SAFETENSORS.items()},
    **{f"torch.save, pickle that calls {how}": _torch_file(how, legacy=False) for how in ("system", "eval", "open")},
    **{f"legacy torch.save, pickle that calls {how}": _torch_file(how, legacy=True) for how in ("system", "eval")},
    **{f"bare pickle of protocol {p} that calls system": _raw_pickle("system", p) for p in (0, 2, 4)},
    "zip bomb: storage of 512 MiB packed": lambda t: _zip_bomb(t.folder / "w.pth", _BOMB_BYTES, member="data/0"),
    "zip bomb: pickle of 512 MiB packed": lambda t: _zip_bomb(t.folder / "w.pth", _BOMB_BYTES, member="data.pkl"),
    "zip whose members leave the folder": _nested_zip_names,
    "zip cut in the middle": lambda t: t.file("w.pth", b"PK\x03\x04" + bytes(64)),
    "pickle that pops an empty stack": lambda t: t.file("w.pth", b"\x80\x02a."),
    "pickle that reads an unknown memo": lambda t: t.file("w.pth", b"\x80\x02h\x07."),
    "pickle with a string of 2^31 bytes that is not there": lambda t: t.file("w.pth", b"\x80\x02X\xff\xff\xff\x7f"),
    "pickle of a list, not of tensors": lambda t: t.file("w.pth", pickle.dumps([1, 2, 3], 2)),
    "random bytes": lambda t: t.file("w.pth", bytes(range(256)) * 8),
    "pickle of one tensor of 2^40 numbers": _huge_claim,
    "backbone with a tensor on the device meta": lambda t: _backbone_with(t, lambda x: x.to("meta")),
    "backbone with a sparse tensor": lambda t: _backbone_with(t, lambda x: x.to_sparse()),
    "backbone of complex numbers": lambda t: _backbone_with(t, lambda x: x.to(torch.complex64)),
    "backbone of integers": lambda t: _backbone_with(t, lambda x: x.long()),
}


def _backbone_with(target: Target, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Return the run's own backbone with one tensor changed: names and shapes are right."""
    prefix = "teacher.backbone."
    model = read_checkpoint(target.checkpoint).tensors["model"]
    tensors = {name.removeprefix(prefix): value for name, value in model.items() if name.startswith(prefix)}
    tensors["cls_token"] = change(tensors["cls_token"])
    path = target.folder / "weights.pth"
    torch.save(tensors, path)
    return path


def _outside(target: Target, name: str) -> Path:
    save_file({"x": torch.zeros(1)}, target.folder / "secret.safetensors")
    return target.rewrite_manifest(**{name: describe_file(target.folder / "secret.safetensors")})


def _linked(target: Target, name: str) -> Path:
    moved = (target.checkpoint / name).rename(target.folder / "elsewhere")
    (target.checkpoint / name).symlink_to(moved)
    return target.checkpoint


def _sparse(target: Target, name: str) -> Path:
    """Let a file of JSON be 512 MiB of nothing, the manifest fitting where it is not the file."""
    os.truncate(target.checkpoint / name, _BOMB_BYTES)
    return target.checkpoint if name == MANIFEST_NAME else target.rewrite_manifest()


def _pipe(target: Target, name: str) -> Path:
    (target.checkpoint / name).unlink()
    os.mkfifo(target.checkpoint / name)
    return target.checkpoint


def _first(tensors: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the first tensor that is a matrix of floats, or else the first."""
    named = next((n for n, t in tensors.items() if t.ndim > 1 and t.is_floating_point()), next(iter(tensors)))
    tensors[named] = change(tensors[named]).contiguous()


def _tensor_cases() -> dict[str, Callable[[Target], Path]]:
    """Return sound files whose tensors are not those of the run."""
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "turned on its side": lambda t: t.reshape(-1),
        "one row short": lambda t: t[:-1],
        "of float64": lambda t: t.double(),
        "of float16": lambda t: t.half(),
        "of int64": lambda t: t.long(),
        "of complex64": lambda t: t.to(torch.complex64),
    }
    cases: dict[str, Callable[[Target], Path]] = {}
    for file in ("model", "optimizer"):
        for name, change in changes.items():
            cases[f"{file}: a tensor {name}"] = lambda t, f=file, c=change: t.with_tensors(f, lambda x: _first(x, c))
        cases[f"{file}: a tensor missing"] = lambda t, f=file: t.with_tensors(f, lambda x: x.pop(next(iter(x))))
        cases[f"{file}: a tensor too many"] = lambda t, f=file: t.with_tensors(
            f, lambda x: x.update({"../evil": torch.zeros(1)})
        )
    cases["rng: too short"] = lambda t: t.with_tensors("rng", lambda x: x.update(cpu=x["cpu"][:8].clone()))
    cases["rng: of float32"] = lambda t: t.with_tensors("rng", lambda x: x.update(cpu=x["cpu"].float()))
    cases["rng: missing"] = lambda t: t.with_tensors("rng", lambda x: (x.pop("cpu"), x.update(y=torch.zeros(1))))
    return cases


def _remove_from_manifest(target: Target, name: str) -> Path:
    path = target.checkpoint / MANIFEST_NAME
    manifest = parse_manifest(path.read_text(encoding="utf-8"))
    files = {key: value for key, value in manifest.files.items() if key != name}
    path.write_text(Manifest(manifest.step, files).to_text(), encoding="utf-8")
    return target.checkpoint


CHECKPOINTS: dict[str, Callable[[Target], Path]] = {
    **{f"model.safetensors: {name}": _checkpoint_safetensors(make) for name, make in _SAFETENSORS.items()},
    **{
        f"manifest that names {name!r}": lambda t, n=name: _outside(t, n)
        for name in ("../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "x.pkl", ".safetensors")
    },
    **{f"{name} is a link": lambda t, n=name: _linked(t, n) for name in (MANIFEST_NAME, "model.safetensors")},
    **{f"{name} is a pipe": lambda t, n=name: _pipe(t, n) for name in (MANIFEST_NAME, "rng.safetensors")},
    **{f"{name} of 512 MiB": lambda t, n=name: _sparse(t, n) for name in (MANIFEST_NAME, STATE_NAME)},
    "manifest nested 100,000 deep": lambda t: _plain(t, MANIFEST_NAME, b"[" * 100_000),
    "manifest with a number of 10,000 digits": lambda t: _plain(t, MANIFEST_NAME, b'{"step": ' + b"9" * 10_000 + b"}"),
    "manifest without the optimizer": lambda t: _remove_from_manifest(t, "optimizer.safetensors"),
    "manifest without the random state": lambda t: _remove_from_manifest(t, "rng.safetensors"),
    "state nested 100,000 deep": lambda t: t.with_file(STATE_NAME, b"[" * 100_000),
    "state that is a pickle": lambda t: t.with_file(STATE_NAME, pickle.dumps(_Executes(t.canary, "system"), 0)),
    "state that is a list": lambda t: t.with_state(lambda _: []),
    "state without the configuration": lambda t: t.without("config"),
    "state whose configuration is a text": lambda t: t.with_state(lambda s: s.update(config="x")),
    "state whose batch size is a list": lambda t: t.with_state(
        lambda s: s["config"].update({"train.batch_size_per_gpu": {}})
    ),
    "state without the optimizer": lambda t: t.without("optimizer"),
    "state whose optimizer is a list": lambda t: t.with_state(lambda s: s.update(optimizer=[])),
    "state whose parameters are numbers": lambda t: t.with_state(lambda s: s["optimizer"].update(names=[1, None])),
    "state without the seconds": lambda t: t.without("seconds"),
    "state whose seconds are a list": lambda t: t.with_state(lambda s: s.update(seconds=[])),
    **_tensor_cases(),
}


def _plain(target: Target, name: str, content: bytes) -> Path:
    """Replace a file and leave the manifest alone."""
    (target.checkpoint / name).write_bytes(content)
    return target.checkpoint


def _bundle_config(target: Target) -> Path:
    """Return a bundle for scripts/replay.py whose configuration would run code in a careless YAML reader."""
    folder = target.folder / FOLDER
    folder.mkdir()
    (folder / CONFIG).write_text(f"a: !!python/object/apply:os.system ['touch {target.canary}']\n", encoding="utf-8")
    tensors = {"model": {"x": torch.zeros(1)}, "batch": {"x": torch.zeros(1)}, "rng": {"cpu": torch.get_rng_state()}}
    return CheckpointStore(folder).save(1, tensors, {"teacher_temp": 0.04})


def hostile_files(run: SmallRun, folder: Path, count: int | None) -> Outcome:
    """Give every hostile file to what reads its kind, each in a process of its own with little memory.

    Args:
        run: takes over the checkpoints, as a resume does; is stepped once.
        folder: an empty one.
        count: the first so many of them; None for all.
    """
    outcome = Outcome("refused with CheckpointError or ValueError, within memory and time; nothing executed")
    sound = run.checkpoint(CheckpointStore(folder / "sound")).path

    def resume(path: Path) -> None:
        checkpoint = read_checkpoint(path)
        check_same_run(checkpoint, run.cfg)
        run.state.restore(checkpoint)

    def load_weights(path: Path) -> None:
        load_exact(run.state.model.teacher.backbone, read_state_dict(path))

    kinds: list[tuple[str, Reader, dict[str, Callable[[Target], Path]]]] = [
        ("weight_files", load_weights, WEIGHT_FILES),
        ("checkpoints", resume, CHECKPOINTS),
        ("replay_bundles", replay_step_on_cpu, {"YAML that calls system": _bundle_config}),
    ]
    code, problem = _in_own_process(resume, sound)
    if code != _ACCEPTED:  # or the refusals below prove nothing
        outcome.failures.append(f"the sound checkpoint is refused: {problem}")
    cases = [(kind, reader, name, make) for kind, reader, files in kinds for name, make in files.items()]
    for index, (kind, reader, name, make) in enumerate(cases[:count]):
        target = _target(folder / str(index), sound)
        outcome.count(kind)
        outcome.judge(name, _refusal_problem(reader, make(target), target.canary))
        shutil.rmtree(target.folder)
    return outcome


def replay_step_on_cpu(path: Path) -> object:
    """Run the step of a bundle again."""
    return replay_step(path, torch.device("cpu"))


def _target(folder: Path, sound: Path) -> Target:
    folder.mkdir()
    return Target(folder, shutil.copytree(sound, folder / sound.name), folder / "executed")


def _refusal_problem(reader: Reader, path: Path, canary: Path) -> str | None:
    """Return how a file was received other than by a refusal, or None."""
    code, problem = _in_own_process(reader, path)
    if canary.exists():
        return "its code was executed"
    if code == _ACCEPTED:
        return "accepted"
    return problem


def _in_own_process(reader: Reader, path: Path) -> tuple[int, str | None]:
    """Read a file in a copy of this process; return its exit code and what was wrong with how it ended, or None."""
    notes_from, notes_to = os.pipe()
    held = _resident_bytes()
    child = os.fork()
    if child == 0:
        os.close(notes_from)
        _read_and_exit(reader, path, notes_to)
    os.close(notes_to)
    status, used = _wait(child)
    with os.fdopen(notes_from, "rb") as notes:
        note = notes.read().decode(errors="replace")
    if os.WIFSIGNALED(status):
        return -os.WTERMSIG(status), f"the process ended by {signal.Signals(os.WTERMSIG(status)).name}"
    code = os.WEXITSTATUS(status)
    if code == _OTHER_ERROR:
        return code, note
    if used - held > _MOST_MEMORY_BYTES:
        return code, f"took {(used - held) // MIB} MiB"
    return code, None if code in (_REFUSED, _ACCEPTED) else f"exit code {code}"


def _resident_bytes() -> int:
    """Return what this process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _read_and_exit(reader: Reader, path: Path, notes: int) -> None:
    """Read the file and end this process with a code that says how that went. Never returns."""
    code = _OTHER_ERROR
    try:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + _ADDRESS_SPACE_BYTES,) * 2)
        reader(path)
        code = _ACCEPTED
    except (CheckpointError, ValueError) as error:
        code = _REFUSED
        os.write(notes, f"{type(error).__name__}: {error}"[:500].encode(errors="replace"))
    except BaseException as error:  # a finding, whatever it is
        os.write(notes, f"{type(error).__name__}: {error}"[:500].encode(errors="replace"))
    finally:
        os._exit(code)


def _wait(child: int) -> tuple[int, int]:
    """Return exit status and peak memory in bytes of a child, killed if it takes too long."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return status, usage.ru_maxrss * 1024
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage.ru_maxrss * 1024
        time.sleep(0.002)
