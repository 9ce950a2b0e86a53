"""`scripts/export_checkpoint.py`: any checkpoint becomes the files that the run itself would have exported."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinov2_equi.config.schema import Config
from dinov2_equi.fsdp.checkpoint import CheckpointStore, read_checkpoint
from dinov2_equi.run.load import load_eval_model
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch
from dinov2_equi.train.state import flat_config

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = ("teacher_checkpoint.pth", "teacher_backbone.safetensors", "equi_branch.safetensors")


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(REPOSITORY / "scripts" / "export_checkpoint.py")


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=True)
    return dict(content.get("teacher", content))


def assert_same_files(folder: Path, run: Path) -> None:
    for name in FILES:
        expected, found = tensors_in(run / name), tensors_in(folder / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name
    released = tensors_in(folder / "teacher_backbone_pretrain.pth")
    assert all(torch.equal(t, released[key]) for key, t in tensors_in(run / FILES[1]).items())


@pytest.mark.parametrize("source", ["", "checkpoints", "checkpoints/step_00000020"])
def test_the_exported_teacher_is_another(
    source: str, script: ModuleType, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(finished_run / source), "--output", str(tmp_path)]) == 0
    assert_same_files(tmp_path, finished_run)
    assert "bit for bit" in capsys.readouterr().out


def test_exported_files_give_other_tokens_than_the_run(script: ModuleType, finished_run: Path, tmp_path: Path) -> None:
    assert script.main([str(finished_run), "--output", str(tmp_path)]) == 0
    model = load_eval_model(str(finished_run))
    images = torch.randn(2, 3, model.image_size, model.image_size + 2 * model.patch_size)
    expected = model.backbone(images)
    for name in ("teacher_checkpoint.pth", "teacher_backbone_pretrain.pth", "teacher_backbone.safetensors"):
        assert torch.equal(load_eval_model(str(tmp_path / name)).backbone(images), expected), name


def test_torch_hub_does_not_load_what_a_checkpoint_is_exported_to(
    script: ModuleType, tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    # The smallest architecture that has an entry point; blocks in groups, whose names differ from the released ones.
    cfg = make_config("student.arch=vit_small", "student.patch_size=16", "student.block_chunks=4")
    model = SSLMetaArch(cfg).eval()
    store = CheckpointStore(tmp_path / "checkpoints")
    path = store.save(1, {"model": model.state_dict()}, {"config": flat_config(cfg)})
    assert script.main([str(path), "--output", str(tmp_path)]) == 0
    images = torch.randn(1, 3, 64, 96)
    expected = model.teacher["backbone"](images)
    for name in ("teacher_checkpoint.pth", "teacher_backbone_pretrain.pth", "teacher_backbone.safetensors"):
        loaded = torch.hub.load(str(REPOSITORY), "dinov2_equi_vits16", source="local", weights=tmp_path / name)
        assert torch.equal(loaded(images), expected), name
        (tmp_path / name).unlink()  # 90 MB each
    shutil.rmtree(path)


@pytest.mark.parametrize(("name", "tensor"), [(FILES[0], "backbone.cls_token"), (FILES[2], "objective.")])
def test_a_wrong_file_is_taken_for_a_right_one(
    name: str,
    tensor: str,
    script: ModuleType,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = script.export_teacher

    def spoil(model: torch.nn.Module, folder: Path) -> None:
        write(model, folder)
        content = tensors_in(folder / name)
        next(t for key, t in content.items() if key.startswith(tensor)).add_(1)
        if name == FILES[0]:
            torch.save({"teacher": content}, folder / name)
        else:
            save_file(content, folder / name)

    monkeypatch.setattr(script, "export_teacher", spoil)
    assert script.main([str(finished_run), "--output", str(tmp_path)]) == 1
    assert f"DIFFERS in {tensor}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_in_a_traceback(
    script: ModuleType, finished_run: Path, tmp_path: Path, assert_refused: Callable[..., None]
) -> None:
    out = ["--output", str(tmp_path / "out")]
    assert_refused(script, [str(tmp_path / "nowhere"), *out], "there is no folder")
    assert_refused(script, [str(tmp_path), *out], "no checkpoint in")
    assert_refused(script, [str(finished_run), "--step", "7", *out], "no checkpoint of step 7")
    store = CheckpointStore(tmp_path / "store")
    assert_refused(script, [str(store.save(1, {"t": {"x": torch.zeros(1)}}, {})), *out], "no checkpoint of a training")
    path = Path(shutil.copytree(finished_run / "checkpoints" / "step_00000020", tmp_path / "step_00000020"))
    checkpoint = read_checkpoint(path)
    config = {**checkpoint.state["config"], "student.arch": "vit_smal"}
    broken = store.save(2, checkpoint.tensors, {"config": config})
    assert_refused(script, [str(broken), *out], "student.arch")
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert_refused(script, [str(path), *out], "is damaged")
    assert not (tmp_path / "out").exists()
    assert sys.path[0] != str(REPOSITORY / "scripts")
