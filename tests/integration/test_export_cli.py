"""`run/export.py`: every format gives the source's tokens, and the card says what there is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dinov2_equi.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from dinov2_equi.evaluation.model import load_backbone
from dinov2_equi.hub import exporters
from dinov2_equi.hub.exporters import EXPORTERS, TOLERANCE
from dinov2_equi.models.registry import build_backbone
from dinov2_equi.run.export import main

NEEDED = {"transformers": "transformers", "timm": "timm", "onnx": "onnxruntime"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return weight files of tiny backbones, by kind."""
    kinds = {"plain": {}, "registers": {"num_register_tokens": 4}, "gated": {"ffn_layer": "swiglufused"}}
    files = {}
    for kind, options in kinds.items():
        torch.manual_seed(0)
        model = build_backbone("vit_test_tiny", img_size=32, patch_size=8, init_values=0.5, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        files[kind] = tmp_path_factory.mktemp("weights") / f"{kind}.pth"
        torch.save(model.state_dict(), files[kind])
    return files


@pytest.mark.parametrize("kind", ["plain", "registers", "gated"])
@pytest.mark.parametrize("name", EXPORTERS)
def test_export_gives_other_tokens_than_its_source(
    tmp_path: Path, weights: dict[str, Path], name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    if kind != "plain" and name in ("onnx", "torchscript", "torch_export"):
        pytest.skip("a trace knows nothing of names")
    words = ("--weights", str(weights[kind]), "--formats", name, "--output", str(tmp_path), "--size", "48")
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert float(shown.split("largest difference ")[1].split()[0]) <= TOLERANCE
    card = (tmp_path / "README.md").read_text()
    assert f"| {name} |" in card and "width 48, 3 blocks" in card
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "registers"])  # their positions are interpolated in two ways
@pytest.mark.parametrize("name", ["onnx", "torch_export"])
def test_export_of_any_size_is_right_at_one_alone(
    tmp_path: Path, weights: dict[str, Path], name: str, kind: str
) -> None:
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    backbone = load_backbone(weights[kind])
    source = exporters.Source(backbone, "tiny", 48, IMAGENET_MEAN, IMAGENET_STD)
    run = EXPORTERS[name](source, tmp_path)
    for size in ((32, 32), (48, 48), (16, 40), (104, 16)):  # the trained one, the recorded rows, not square, a strip
        assert exporters.difference(source, run, *size) <= TOLERANCE


def test_changed_export_is_taken_for_the_source(
    tmp_path: Path,
    weights: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    to_file = exporters.export_pth

    def damaged(source: exporters.Source, folder: Path) -> exporters.Run:
        run = to_file(source, folder)
        return lambda x: tuple(tokens + 2e-4 for tokens in run(x))  # type: ignore[return-value]

    monkeypatch.setitem(EXPORTERS, "pth", damaged)
    assert main(("--weights", str(weights["plain"]), "--formats", "pth", "--output", str(tmp_path))) == 1
    assert "TOO LARGE" in capsys.readouterr().out


def test_missing_library_stops_the_other_formats(
    tmp_path: Path,
    weights: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # an import of it fails
    words = ("--weights", str(weights["plain"]), "--formats", "timm", "safetensors", "--output", str(tmp_path))
    assert main(words) == 1
    shown = capsys.readouterr().out
    assert "not written" in shown and "pip install timm" in shown
    assert set(load_file(tmp_path / "plain.safetensors")) == set(torch.load(weights["plain"], weights_only=True))


def test_card_of_a_run_tells_the_path_of_its_images(tmp_path: Path, lean_run: Callable[..., int]) -> None:
    run = tmp_path / "my run"
    assert lean_run(run, "train.OFFICIAL_EPOCH_LENGTH=2", "optim.epochs=1") == 0
    assert main(("--weights", str(run), "--output", str(tmp_path / "out"))) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "dinov2_equi"
    assert str(tmp_path) not in card
    assert "OFFICIAL_EPOCH_LENGTH: 2" in card and "family: se2" in card
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "my_run.safetensors",
        "my_run_pretrain.pth",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--weights", "nowhere.pth"), "there is no file 'nowhere.pth'"),
        (("--weights", "PLAIN", "--size", "33"), "multiple of its patch size 8, got 33"),
    ],
)
def test_wrong_input_gives_a_traceback(
    tmp_path: Path,
    weights: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    words = [word.replace("PLAIN", str(weights["plain"])) for word in arguments]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
