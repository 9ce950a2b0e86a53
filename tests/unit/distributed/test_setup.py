"""What a launcher says, and what is refused before anything hangs."""

from __future__ import annotations

import pytest

from dinov2_equi.distributed.setup import Launch, process_group, read_launch

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS", "SLURM_PROCID")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_plain_process_belongs_to_a_group() -> None:
    assert read_launch() == Launch(world_size=1, rank=0, local_rank=0)
    with process_group(read_launch(), "cpu"):
        pass


def test_variables_of_torchrun_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert read_launch() == Launch(world_size=8, rank=5, local_rank=1)


def test_a_world_without_ranks_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set.*torchrun"):
        read_launch()


def test_tasks_of_slurm_train_into_one_folder_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "2")
    with pytest.raises(ValueError, match="SLURM_NTASKS=4.*torchrun"):
        read_launch()


def test_an_allocation_of_slurm_without_srun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")  # salloc or sbatch alone: this is the only process
    assert read_launch().world_size == 1
