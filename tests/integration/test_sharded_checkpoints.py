"""Checkpoints of sharded runs: written by all ranks, read by any number of them, whole or not at all."""

from __future__ import annotations

import errno
import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dinov2_equi.config.derive import derive
from dinov2_equi.config.schema import Config
from dinov2_equi.data.loaders import on_device
from dinov2_equi.distributed.rank_group import rank_group
from dinov2_equi.fsdp import checkpoint as checkpoint_module
from dinov2_equi.fsdp.checkpoint import Checkpoint, CheckpointStore, read_checkpoint, sha256_of_tensors
from dinov2_equi.fsdp.manifest import MANIFEST_NAME, CheckpointError, Manifest, describe_file, parse_manifest
from dinov2_equi.train import build
from dinov2_equi.train.state import TrainState
from dinov2_equi.train.step import train_step
from tests.ranks import in_a_group

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.skipif(sys.platform == "win32", reason="needs fork"),
]
CPU = torch.device("cpu")
REPOSITORY = Path(__file__).resolve().parents[2]
MakeConfig = Callable[..., Config]
SMALL = ("ibot.separate_head=true", "equi.decoder.width=32", "train.OFFICIAL_EPOCH_LENGTH=1")


def on_ranks(world_size: int, folder: Path, function: Callable[[], None]) -> None:
    """Call a function in processes of one group; see `in_a_group`."""
    folder.mkdir(exist_ok=True)
    in_a_group(world_size, folder, lambda _: function())


def start(cfg: Config, *, resumes: bool = False) -> TrainState:
    torch.manual_seed(cfg.train.seed)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return build.build_state(cfg, derive(cfg, world_size=world_size), CPU, resumes=resumes)


def step(state: TrainState, cfg: Config) -> None:
    """Train a step on the first batch: afterwards the optimiser has a state of every parameter."""
    derived = derive(cfg, world_size=1)
    dataset, _ = build.build_datasets(cfg)
    batch = next(iter(build.build_loader(cfg, derived, dataset, start_step=0, pin_memory=False)))
    state.model.train()
    train_step(state, on_device(batch, CPU), build.build_schedules(cfg, derived).at(0), cfg, CPU)


def store_in(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder, ranks=rank_group())


def learned(checkpoint: Checkpoint) -> str:
    """Return a hash of all weights, centres and moments."""
    return sha256_of_tensors(
        {f"{name}/{key}": t for name in ("model", "optimizer") for key, t in checkpoint.tensors[name].items()}
    )


@pytest.fixture(scope="module")
def cfg(make_config: MakeConfig) -> Config:
    return make_config(*SMALL)


@pytest.fixture(scope="module")
def saved_on(tmp_path_factory: pytest.TempPathFactory, cfg: Config) -> Callable[[int], Path]:
    """Return a function from a number of ranks to the folder of their checkpoints, of steps 1 and 2; not to change."""

    @functools.cache
    def folder_of(world_size: int) -> Path:
        folder = tmp_path_factory.mktemp("saved")

        def run() -> None:
            state, store = start(cfg), store_in(folder / "checkpoints")
            for _ in range(2):
                step(state, cfg)
                state.save(store, cfg)

        on_ranks(world_size, folder, run)
        return folder / "checkpoints"

    return folder_of


@pytest.mark.parametrize("after", [1, 2, 4])
@pytest.mark.parametrize("before", [1, 2, 4])
def test_another_number_of_ranks_changes_a_bit(
    before: int, after: int, saved_on: Callable[[int], Path], tmp_path: Path, cfg: Config
) -> None:
    saved = saved_on(before)

    def run() -> None:
        state = start(cfg, resumes=True)
        state.restore(CheckpointStore(saved, read_only=True, ranks=rank_group()).load())
        state.save(store_in(tmp_path / "again"), cfg)

    on_ranks(after, tmp_path, run)
    original, again = read_checkpoint(saved / "step_00000002"), read_checkpoint(tmp_path / "again" / "step_00000002")
    assert learned(original) == learned(again)
    assert original.tensors["optimizer"].keys() == again.tensors["optimizer"].keys()


def test_no_rank_writes_what_another_one_has(saved_on: Callable[[int], Path]) -> None:
    path = saved_on(4) / "step_00000002"
    whole = read_checkpoint(path).tensors["model"]
    parts = [load_file(path / f"model-{rank:05d}-of-00004.safetensors") for rank in range(4)]
    sizes = [sum(t.numel() for t in part.values()) for part in parts]
    assert sum(sizes) == sum(t.numel() for t in whole.values())
    assert max(sizes) < 0.4 * sum(sizes)  # a quarter, and what is small or not sharded


def test_a_sharded_start_draws_other_weights(tmp_path: Path, cfg: Config) -> None:
    folder = tmp_path / "checkpoints"

    def run() -> None:
        start(cfg).save(store_in(folder), cfg)

    on_ranks(2, tmp_path, run)
    model = start(cfg).model
    sharded = read_checkpoint(folder / "step_00000000").tensors["model"]
    assert sha256_of_tensors(sharded) == sha256_of_tensors(model.state_dict())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_ranks_saved_cannot_be_exported(
    world_size: int, saved_on: Callable[[int], Path], load_script: Callable[[Path], ModuleType], tmp_path: Path
) -> None:
    script = load_script(REPOSITORY / "scripts" / "export_checkpoint.py")
    path = saved_on(world_size) / "step_00000002"
    assert script.main([str(path), "--output", str(tmp_path)]) == 0
    parts = [load_file(file) for file in sorted(path.glob("model*.safetensors"))]
    assert len(parts) == world_size
    names = {name for part in parts for name in part if name.startswith("teacher.")}
    exported = torch.load(tmp_path / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    backbone = load_file(tmp_path / "teacher_backbone.safetensors")
    assert {name.removeprefix("teacher.") for name in names} <= exported.keys()
    for name in names:
        rows = torch.cat(
            [part[name] for part in parts if name in part]
        )  # each rank holds the rows after the last one's
        assert torch.equal(exported[name.removeprefix("teacher.")], rows), name
    for name, tensor in backbone.items():
        assert torch.equal(exported[f"backbone.{name}"], tensor), name


def test_the_damage_of_one_rank_is_exported(
    saved_on: Callable[[int], Path],
    load_script: Callable[[Path], ModuleType],
    tmp_path: Path,
    assert_refused: Callable[..., None],
) -> None:
    script = load_script(REPOSITORY / "scripts" / "export_checkpoint.py")
    path = Path(shutil.copytree(saved_on(2) / "step_00000002", tmp_path / "step_00000002"))
    with (path / "model-00001-of-00002.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert_refused(script, [str(path), "--output", str(tmp_path / "out")], "is damaged")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------- damage


def copy_of(saved: Path, folder: Path) -> Path:
    return Path(checkpoint_module.shutil.copytree(saved, folder / "checkpoints"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def without_a_part(path: Path) -> None:
    """Take a rank's part away, manifest and all."""
    part = path / "model-00001-of-00002.safetensors"
    part.unlink()
    manifest = parse_manifest((path / MANIFEST_NAME).read_text())
    files = {name: entry for name, entry in manifest.files.items() if name != part.name}
    (path / MANIFEST_NAME).write_text(Manifest(manifest.step, files).to_text())


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of the other rank's part": lambda path: flip(path / "model-00001-of-00002.safetensors"),
    "a part is gone": lambda path: (path / "optimizer-00000-of-00002.safetensors").unlink(),
    "a part was never there": without_a_part,
    "the manifest": lambda path: flip(path / MANIFEST_NAME),
    "the state": lambda path: flip(path / "state.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_ranks_fall_back_to_different_checkpoints(damage: str, saved_on: Callable[[int], Path], tmp_path: Path) -> None:
    directory = copy_of(saved_on(2), tmp_path)
    DAMAGES[damage](directory / "step_00000002")

    def run() -> None:
        store = store_in(directory)
        assert store.load().step == 1
        with pytest.raises(CheckpointError, match="is damaged"):
            store.load(2)

    on_ranks(2, tmp_path, run)
    assert CheckpointStore(directory, read_only=True).load().step == 1


def with_rows(path: Path, change: Callable[[str], str]) -> None:
    """Change the header of a part that says which rows are in it, the manifest fitting."""
    part = path / "model-00001-of-00002.safetensors"
    with safe_open(part, framework="pt") as file:
        rows = file.metadata()["rows"]
    save_file(load_file(part), part, metadata={"rows": change(rows)})
    manifest = parse_manifest((path / MANIFEST_NAME).read_text())
    text = Manifest(manifest.step, {**manifest.files, part.name: describe_file(part)}).to_text()
    (path / MANIFEST_NAME).write_text(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: "[",
        lambda rows: "[1]",
        lambda rows: "{}",
        lambda rows: rows.replace("[", "[-", 1),
        lambda rows: rows.replace("]", "0]", 1),
        lambda rows: rows.replace(", ", f", {2**62}", 1),
        lambda rows: rows.replace('"', '"x', 1),
        lambda rows: "[" * 100_000,
    ],
)
def test_a_header_that_lies_about_rows_is_believed(
    change: Callable[[str], str], saved_on: Callable[[int], Path], tmp_path: Path
) -> None:
    path = copy_of(saved_on(2), tmp_path) / "step_00000002"
    with_rows(path, change)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_checkpoint(path)
    with_rows(path, lambda _: json_of_rows(saved_on(2)))
    read_checkpoint(path)  # or the refusals prove nothing


def json_of_rows(saved: Path) -> str:
    with safe_open(saved / "step_00000002" / "model-00001-of-00002.safetensors", framework="pt") as file:
        return str(file.metadata()["rows"])


# ------------------------------------------------------------------------------------------------------ failing saves


@pytest.mark.parametrize(
    ("failing_rank", "call"),
    [
        *((rank, call) for rank in (0, 1) for call in ("save_file", "_sync_file", "describe_file")),
        *((0, call) for call in ("_write_text", "_sync_directory")),  # the main process alone calls these
    ],
)
def test_a_rank_that_cannot_write_leaves_half_a_checkpoint(
    failing_rank: int, call: str, saved_on: Callable[[int], Path], tmp_path: Path, cfg: Config
) -> None:
    directory = copy_of(saved_on(2), tmp_path)

    def run() -> None:
        state, store = start(cfg, resumes=True), store_in(directory)
        state.restore(store.load())
        step(state, cfg)
        works = getattr(checkpoint_module, call)
        if dist.get_rank() == failing_rank:
            setattr(checkpoint_module, call, raise_no_space)
        with pytest.raises(CheckpointError, match=f"step 3 could not be written .*rank {failing_rank}: .*No space"):
            state.save(store, cfg)
        setattr(checkpoint_module, call, works)
        assert store.load().step in {2, 3}  # 3 where only the last flush failed
        state.save(store, cfg)
        assert store.load().step == 3

    on_ranks(2, tmp_path, run)
    assert not list(directory.glob(".*"))
    assert CheckpointStore(directory).load().step == 3


def raise_no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# ------------------------------------------------------------------------------------------------- in the background


def test_a_save_in_the_background_holds_later_weights(
    saved_on: Callable[[int], Path], tmp_path: Path, cfg: Config
) -> None:
    def run() -> None:
        state, store = start(cfg), store_in(tmp_path / "checkpoints")
        for _ in range(2):
            step(state, cfg)
            state.save(store, cfg, in_background=True)
        step(state, cfg)  # goes on while the second one is written
        store.wait()

    on_ranks(2, tmp_path, run)
    for number in (1, 2):
        expected = CheckpointStore(saved_on(2), read_only=True).load(number)
        assert learned(CheckpointStore(tmp_path / "checkpoints", read_only=True).load(number)) == learned(expected)


def test_one_rank_alone_learns_of_a_failed_save_in_the_background(tmp_path: Path, cfg: Config) -> None:
    def run() -> None:
        state, store = start(cfg), store_in(tmp_path / "checkpoints")
        if dist.get_rank() == 1:
            checkpoint_module.save_file = raise_no_space  # type: ignore[assignment]
        state.save(store, cfg, in_background=True)
        with pytest.raises(CheckpointError, match="rank 1: .*No space"):
            store.wait()
        assert store.latest_step() is None

    on_ranks(2, tmp_path, run)
    assert not list((tmp_path / "checkpoints").iterdir())
