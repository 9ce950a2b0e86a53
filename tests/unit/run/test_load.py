"""Backbones from the strings that name them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinov2_equi.config.load import to_yaml
from dinov2_equi.config.schema import Config
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.hub.released import RELEASED
from dinov2_equi.models.registry import build_backbone
from dinov2_equi.run.load import load_eval_model, load_eval_models
from dinov2_equi.train.build import build_initial_backbone
from dinov2_equi.train.export import export_teacher
from dinov2_equi.train.ssl_meta_arch import SSLMetaArch

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MakeConfig = Callable[..., Config]


def make_run(folder: Path, cfg: Config) -> SSLMetaArch:
    """Write what a run with other weights than the initial ones leaves for evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(5)
    model = SSLMetaArch(cfg).eval()
    export_teacher(model, folder)
    (folder / "config.yaml").write_text(to_yaml(cfg))
    return model


def features(model: EvalModel) -> dict[str, Tensor]:
    return model.features(X, device="cpu")


@pytest.fixture
def cfg(make_config: MakeConfig) -> Config:
    return make_config(
        "equi.projection_dim=40",
        "equi.dim=16",
        "equi.layer=1",
        "equi.fill=zeros",
        "equi.max_rotation_deg=30",
        "data.mean=[0.1,0.2,0.3]",
        "data.std=[0.4,0.5,0.6]",
        "student.num_register_tokens=2",
    )


def test_a_run_forgets_its_settings(tmp_path: Path, cfg: Config) -> None:
    make_run(tmp_path / "my_run", cfg)
    model = load_eval_model(str(tmp_path / "my_run"))
    assert (model.name, model.image_size, model.patch_size) == ("my_run", 32, 8)
    assert (model.mean, model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert model.families is not None
    assert (model.families.fill, model.families.max_rotation_deg) == ("zeros", 30.0)
    assert model.split_block == 1


def test_halves_of_a_run_are_not_those_of_its_teacher(tmp_path: Path, cfg: Config) -> None:
    trained = make_run(tmp_path, cfg)
    model = load_eval_model(str(tmp_path))
    found = features(model)
    split = trained.teacher["feature_split"]
    output = trained.teacher["backbone"].forward_features(  # type: ignore[operator]
        (X - torch.tensor(model.mean)[:, None, None]) / torch.tensor(model.std)[:, None, None], more_blocks=(1,)
    )
    (block,) = output["x_norm_blocks"]
    cls, patches = output["x_norm_clstoken"], output["x_norm_patchtokens"]
    # 1e-5: float32; a mean of projections against a projection of the mean.
    invariant = [split.invariant(cls), split.invariant(patches).mean(dim=1)]  # type: ignore[operator]
    torch.testing.assert_close(found["invariant"], torch.cat(invariant, dim=1), atol=1e-5, rtol=0)
    equivariant = [split.equivariant(block[:, 0]), split.equivariant(block[:, 3:]).mean(dim=1)]  # type: ignore[operator]
    torch.testing.assert_close(found["equivariant"], torch.cat(equivariant, dim=1), atol=1e-5, rtol=0)


def test_slices_of_channels_need_the_teacher_file(tmp_path: Path, make_config: MakeConfig) -> None:
    make_run(tmp_path, make_config("equi.dim=12"))
    (tmp_path / "teacher_checkpoint.pth").unlink()
    found = features(load_eval_model(str(tmp_path)))
    assert torch.equal(found["equivariant"][:, :12], found["cls"][:, -12:])
    assert torch.equal(found["invariant"][:, :36], found["cls"][:, :36])


def test_a_lost_projection_is_replaced_by_a_random_one(
    tmp_path: Path, cfg: Config, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(tmp_path, cfg)
    (tmp_path / "teacher_checkpoint.pth").unlink()
    with caplog.at_level(logging.WARNING):
        model = load_eval_model(str(tmp_path))
    assert model.split is None
    assert model.split_block is None
    assert "teacher_checkpoint.pth is gone" in caplog.text


def test_a_run_without_family_has_halves(tmp_path: Path, make_config: MakeConfig) -> None:
    make_run(tmp_path, make_config("equi.family=null", "equi.loss_weight=0"))
    assert load_eval_model(str(tmp_path)).split is None


def test_random_is_not_what_the_run_started_from(tmp_path: Path, cfg: Config) -> None:
    make_run(tmp_path / "run", cfg)
    state = torch.get_rng_state()
    models = load_eval_models([str(tmp_path / "run"), "random", f"random:{tmp_path / 'run'}"])
    assert torch.equal(torch.get_rng_state(), state)
    assert [model.name for model in models[:2]] == ["run", "run before training"]
    assert len({model.name for model in models}) == 3
    initial = build_initial_backbone(cfg).state_dict()
    for model in models[1:]:
        assert all(torch.equal(tensor, initial[name]) for name, tensor in model.backbone.state_dict().items())
    torch.manual_seed(cfg.train.seed)
    expected = SSLMetaArch(cfg).student["feature_split"].state_dict()["projection.weight"]
    assert models[1].split is not None
    assert torch.equal(models[1].split.state_dict()["projection.weight"], expected)


@pytest.mark.parametrize("form", ["flat.pth", "teacher.pth", "flat.safetensors"])
def test_a_weight_file_is_not_read(tmp_path: Path, form: str) -> None:
    torch.manual_seed(1)
    backbone = build_backbone("vit_test_tiny", img_size=32, patch_size=8, init_values=0.5).eval()
    state = backbone.state_dict()
    if form == "flat.safetensors":
        save_file(state, tmp_path / form)
    else:
        wrapped = {"teacher": {f"backbone.{name}": tensor for name, tensor in state.items()}}
        torch.save(state if form == "flat.pth" else wrapped, tmp_path / form)
    model = load_eval_model(str(tmp_path / form))
    assert (model.name, model.image_size, model.patch_size) == (form, 32, 8)
    assert torch.equal(model.backbone.state_dict()["pos_embed"], state["pos_embed"])


def test_random_weights_ignore_seed_or_size() -> None:
    first, other = (load_eval_model("random:vit_test_tiny/8", size=64, seed=seed) for seed in (0, 1))
    assert first.image_size == 64
    assert first.backbone.state_dict()["pos_embed"].shape == (1, 65, 48)
    assert not torch.equal(features(first)["cls"], features(other)["cls"])


def test_pixels_are_no_baseline() -> None:
    model = load_eval_model("pixels")
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    cls = model.features(images, device="cpu")["cls"]
    assert cls.shape == (2, 3 * 16 * 16)
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    first = ((images[0] - mean) / std)[:, :2, :3].mean(dim=(1, 2))  # the pixels that the first of 16 x 16 covers
    torch.testing.assert_close(cls[0].view(3, 256)[:, 0], first)
    assert (model.name, model.num_blocks) == ("pixels", 1)


def test_a_hub_name_does_not_reach_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def released(name: str) -> object:
        asked.append(name)
        return build_backbone("vit_test_tiny", img_size=518, patch_size=14)

    monkeypatch.setattr("dinov2_equi.run.load.released_dinov2", released)
    model = load_eval_model("hub:dinov2_vits14")
    assert asked == ["dinov2_vits14"]
    assert (model.name, model.image_size, model.patch_size) == ("hub:dinov2_vits14", 224, 14)
    assert "dinov2_vits14" in RELEASED


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing_there.pth", "there is no file 'nothing_there.pth'.*a run folder, a weight file"),
        ("random:vit_small", "random:vit_small/14, or a run; got random:vit_small"),
        ("random:vit_smal/14", "did you mean 'vit_small'"),
        ("hub:dinov2_vits15", "did you mean 'dinov2_vits14'"),
        ("magic:x", "names nothing else"),
    ],
)
def test_a_wrong_string_is_not_explained(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_eval_model(spec)


def test_a_folder_that_is_no_run_is_not_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder without config\.yaml"):
        load_eval_model(str(tmp_path))


def test_random_without_a_run_means_anything() -> None:
    with pytest.raises(ValueError, match="name a run too"):
        load_eval_models(["random"])


def test_two_backbones_of_one_name_are_mixed_up(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        torch.save(build_backbone("vit_test_tiny", img_size=16, patch_size=8).state_dict(), tmp_path / folder / "w.pth")
    paths = [str(tmp_path / folder / "w.pth") for folder in "abb"]
    assert [model.name for model in load_eval_models(paths)] == ["w.pth", paths[1], f"{paths[1]} (2)"]
