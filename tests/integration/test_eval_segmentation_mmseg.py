"""`eval/segmentation/run.py --framework mmseg` as a user types it, and its numbers against those of the plain path.

Skipped where its packages are missing; `make test-mmseg` has an environment with them.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import ops

pytest.importorskip("mmseg", reason="needs eval/segmentation/requirements.txt: make test-mmseg")

from mmengine.dataset import pseudo_collate
from mmengine.hub import get_config
from mmengine.logging import HistoryBuffer
from mmseg.registry import MODELS

from dinov2_equi.data.datasets.pairs import Pair
from dinov2_equi.data.datasets.segmentation_classes import CITYSCAPES_CLASSES, COCO_STUFF_CLASSES
from dinov2_equi.data.datasets.segmentation_sets import IGNORE, SegmentationSet, make_segmentation_set
from dinov2_equi.evaluation.dense.segmentation import SegmentationModel
from dinov2_equi.evaluation.dense.segmentation_metrics import ConfusionMatrix
from dinov2_equi.evaluation.dense.settings import read_settings
from dinov2_equi.evaluation.dense.training import LoopSettings, parameter_groups
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.evaluation.model import RawPixels, random_backbone
from dinov2_equi.fsdp.checkpoint import sha256_of_tensors
from eval.segmentation import mmseg_loop, mmseg_parts, mmseg_run
from eval.segmentation.mask2former import mask2former_head
from eval.segmentation.mmseg_settings import MmsegSettings

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "eval" / "segmentation" / "run.py"
TINY = ("--framework", "mmseg", "--weights", "random:vit_test_tiny/8", "--device", "cpu", "--set")
RECIPE = ("resize=24", "crop=24", "stride=16", "steps=30", "warmup_steps=1", "batch_size=4", "lr=0.03")
UPERNET = ("head=upernet", "channels=8", "pyramid_channels=8", "crop=21", "stride=13")
MASK2FORMER = (
    "head=mask2former",
    "pyramid_channels=64",
    "queries=4",
    "points=32",
    "encoder_layers=1",
    "decoder_layers=2",
)
SMALL = MmsegSettings(resize=30, crop=21, stride=13, steps=2, warmup_steps=1, batch_size=2)
C = 5

OnRanks = Callable[[int, Callable[[], int]], list[int]]


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def folder(labelled_pairs: Path) -> Path:
    return labelled_pairs


@pytest.fixture
def uneven(tmp_path: Path, write_uneven_pairs: Callable[[Path, int], Path]) -> Path:
    """Return images with class maps, three of which are measured."""
    return write_uneven_pairs(tmp_path / "data", 15)


def backbone(patch_size: int = 8) -> EvalModel:
    network = random_backbone("vit_test_tiny", img_size=4 * patch_size, patch_size=patch_size)
    return EvalModel(name="tiny", backbone=network, patch_size=patch_size)


def both_models(head: str, model: EvalModel) -> tuple[SegmentationModel, Any]:
    """Return the plain model and mmsegmentation's with the same weights, in evaluation mode."""
    settings = dataclasses.replace(SMALL, head=head)
    plain = SegmentationModel(model, settings, C)
    torch.nn.init.normal_(plain.head[1].weight)
    plain.head[0].momentum = 1.0
    plain.train()(torch.rand(2, 3, 64, 64))  # features of images are spread after the norm, and so are the classes
    theirs = mmseg_run.build_model(mmseg_run.model_config(settings, model, C), 0)
    theirs.decode_head.norm.load_state_dict(plain.head[0].state_dict())
    theirs.decode_head.conv_seg.load_state_dict(plain.head[1].state_dict())
    return plain.eval(), theirs.eval()


def test_head_learns_nothing_or_the_files_are_not_written(learn_segmentation: Callable[..., dict[str, Any]]) -> None:
    document = learn_segmentation([*TINY, *RECIPE])
    (numbers,) = document["numbers"].values()
    assert document["settings"]["framework"] == "mmseg" and len(numbers["train_loss"]["loss"]) == 30
    # mmsegmentation's own metric rounds to hundredths of a percent.
    wanted = {"mIoU": numbers["miou"], "aAcc": numbers["pixel_accuracy"], "mAcc": numbers["mean_accuracy"]}
    assert numbers["mmseg"] == pytest.approx({name: 100 * value for name, value in wanted.items()}, abs=0.00501)


@pytest.mark.parametrize("head", ["linear", "multiscale"])
def test_results_file_has_another_form_than_the_plain_path(
    tmp_path: Path, script: ModuleType, folder: Path, head: str
) -> None:
    found = []
    for framework in ("torch", "mmseg"):
        words = [framework if word == "mmseg" else word for word in TINY]
        output = tmp_path / framework
        more = (f"head={head}", "steps=2", "--data", str(folder), "--output", str(output))
        assert script.main([*words, *RECIPE, *more]) == 0
        found.append(json.loads((output / "results.json").read_text()))
    plain, theirs = found
    assert plain.keys() == theirs.keys() and plain["settings"].keys() == theirs["settings"].keys()
    assert plain["numbers"].keys() == theirs["numbers"].keys()
    (plain_numbers,), (their_numbers,) = plain["numbers"].values(), theirs["numbers"].values()
    assert plain_numbers.keys() | {"mmseg"} == their_numbers.keys()


@pytest.mark.parametrize(
    "more",
    [("head=multiscale",), (*UPERNET, "finetune=true", "lr=0.003"), (*MASK2FORMER, "crop=21", "stride=13")],
    ids=["frozen", "all", "mask2former"],
)
def test_stopped_run_ends_with_other_numbers(
    tmp_path: Path, script: ModuleType, folder: Path, interrupted_at: Callable[..., Any], more: tuple[str, ...]
) -> None:
    words = (*TINY, *RECIPE, *more, "steps=5", "save_every=2", "--data", str(folder))
    assert script.main([*words, "--output", str(tmp_path / "whole")]) == 0
    with interrupted_at(mmseg_parts.PaddedEncoderDecoder, "loss", 4):
        assert script.main([*words, "--output", str(tmp_path / "cut")]) == 130
    assert mmseg_loop.newest_checkpoint(tmp_path / "cut/mmseg/checkpoints")[0] == 2
    assert script.main([*words, "--output", str(tmp_path / "cut")]) == 0
    numbers, weights = [], []
    for name in ("whole", "cut"):
        numbers.append(json.loads((tmp_path / name / "results.json").read_text())["numbers"])
        weights.append(torch.load(tmp_path / name / "mmseg/checkpoints/step_5.pth")["state_dict"])
    assert numbers[0] == numbers[1]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any("network" in name or "backbone.blocks" in name for name in weights[0]) == ("finetune=true" in more)


def test_checkpoint_needs_more_than_tensors_and_plain_values(
    tmp_path: Path, script: ModuleType, folder: Path, assert_refused: Callable[..., None]
) -> None:
    words = (*TINY, *RECIPE, "steps=4", "save_every=1", "--data", str(folder), "--output", str(tmp_path))
    assert script.main([*words]) == 0
    checkpoints = tmp_path / "mmseg/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_3.pth", "step_4.pth"]
    state = torch.load(checkpoints / "step_4.pth", weights_only=True)
    histories = state["message_hub"]["log_scalars"]
    assert [len(part) for part in histories["train/loss"]] == [4, 4]
    assert_refused(script, [*words[:-4], "lr=0.01", *words[-4:]], "holds a training that differs in loop, settings")
    torch.save({"message_hub": HistoryBuffer([1.0], [1])}, checkpoints / "step_4.pth")
    assert_refused(script, words, "step_4.pth is no checkpoint of this harness")


class _Payload:
    """Makes a file when it is read in the unsafe mode."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def test_checkpoint_from_elsewhere_runs_code(
    tmp_path: Path, script: ModuleType, folder: Path, assert_refused: Callable[..., None]
) -> None:
    checkpoints, trace = tmp_path / "mmseg/checkpoints", tmp_path / "trace"
    checkpoints.mkdir(parents=True)
    torch.save({"meta": _Payload(trace)}, checkpoints / "step_2.pth")
    words = (*TINY, *RECIPE, "--data", str(folder), "--output", str(tmp_path))
    assert_refused(script, words, "holds more than tensors and plain values")
    assert not trace.exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(checkpoints / "step_2.pth")
    torch.load(checkpoints / "step_2.pth", weights_only=False)
    assert trace.exists()  # the file does what it is meant to


def test_half_a_checkpoint_stops_the_run(tmp_path: Path, script: ModuleType, folder: Path) -> None:
    words = (*TINY, *RECIPE, "steps=4", "save_every=1", "--data", str(folder), "--output", str(tmp_path))
    assert script.main([*words]) == 0
    newest = tmp_path / "mmseg/checkpoints/step_4.pth"
    newest.write_bytes(newest.read_bytes()[:-500])
    assert mmseg_loop.newest_checkpoint(newest.parent)[0] == 3
    assert script.main([*words]) == 0


@pytest.mark.parametrize("patch_size", [8, 14])
@pytest.mark.parametrize("size", [(30, 40), (31, 23), (64, 20)])
def test_prediction_differs_from_the_plain_path(size: tuple[int, int], patch_size: int) -> None:
    plain, theirs = both_models("multiscale", backbone(patch_size))
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for more in ({}, {"test_scales": (0.7, 1.0), "flip_test": True}):
        settings = dataclasses.replace(SMALL, **more)  # type: ignore[arg-type]
        model = MODELS.build({"type": "SegTTAModel", "module": theirs}) if more else theirs
        found = mmseg_run.Predictor(model).predict(image, settings)
        assert found.shape == (1, *size) and found.dtype == torch.int64 and len(found.unique()) > 1
        # Windows are predicted one by one here and in batches there: a pixel between two classes may change sides.
        assert (found == plain.predict(image, settings)).float().mean() > 0.99


@pytest.mark.parametrize("size", [16, 21])
def test_loss_differs_from_the_plain_path(size: int) -> None:
    plain, theirs = both_models("linear", backbone())
    images, labels = torch.rand(2, 3, size, size), torch.randint(0, C, (2, 1, size, size))
    labels[:, :, :5] = IGNORE

    def loss(labels: Tensor) -> Tensor:
        packed = [mmseg_parts.packed_sample(image, values) for image, values in zip(images, labels, strict=True)]
        data = theirs.data_preprocessor(pseudo_collate(packed), training=True)
        found: Tensor = theirs(**data, mode="loss")["decode.loss_ce"]
        return found

    assert torch.allclose(loss(labels), plain.loss(images, labels), atol=1e-5)  # sums in another order
    assert loss(torch.full_like(labels, IGNORE)).item() == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_measure_differs_from_mmsegmentations_on_the_same_maps(seed: int) -> None:
    from mmseg.evaluation import IoUMetric

    rng = np.random.default_rng(seed)
    truth = rng.integers(0, C - 1, (3, 30, 41))  # the last class does not occur
    truth[rng.random(truth.shape) < 0.2] = IGNORE
    predicted = rng.integers(0, C - 1 if seed else C, truth.shape)  # or is predicted in vain
    predicted[0][truth[0] != IGNORE] = 2
    matrix, areas = ConfusionMatrix(C, IGNORE), []
    for p, t in zip(torch.from_numpy(predicted), torch.from_numpy(truth), strict=True):
        matrix.add(p, t)
        areas.append(IoUMetric.intersect_and_union(p, t, C, IGNORE))
    theirs = IoUMetric.total_area_to_metrics(*(sum(parts) for parts in zip(*areas, strict=True)))
    ours = matrix.results([str(c) for c in range(C)])
    wanted = {"miou": np.nanmean(theirs["IoU"]), "mean_accuracy": np.nanmean(theirs["Acc"])}
    wanted |= {"pixel_accuracy": float(theirs["aAcc"])}
    assert {name: ours[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)  # theirs is float32
    assert list(ours["iou"].values()) == pytest.approx(theirs["IoU"].tolist(), rel=1e-6, nan_ok=True)


def test_weights_are_drawn_anew_when_training_begins() -> None:
    model = mmseg_run.build_model(mmseg_run.model_config(SMALL, backbone(), C), 0)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    head = model.decode_head.conv_seg.weight.clone()
    model.init_weights()
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    assert not torch.equal(head, model.decode_head.conv_seg.weight)


@pytest.mark.parametrize("finetune", [False, True])
def test_gradients_reach_a_frozen_backbone_or_miss_the_pyramid(finetune: bool) -> None:
    settings = dataclasses.replace(SMALL, head="upernet", channels=8, pyramid_channels=8, finetune=finetune)
    model = mmseg_run.build_model(mmseg_run.model_config(settings, backbone(14), C), 0).train()
    packed = [
        mmseg_parts.packed_sample(torch.rand(3, 21, 30), torch.ones(1, 21, 30, dtype=torch.int64)) for _ in range(2)
    ]
    data = model.data_preprocessor(pseudo_collate(packed), training=True)
    terms = model(**data, mode="loss")
    (terms["decode.loss_ce"] + terms["aux.loss_ce"]).backward()
    network = model.backbone.network
    assert any(parameter.grad is not None for parameter in network.parameters()) == finetune
    assert network.training == finetune
    inside = {id(parameter) for parameter in network.parameters()}
    assert all(p.grad is not None for p in model.parameters() if id(p) not in inside)
    rates = {name: group["lr"] for group in parameter_groups(model, network, settings) for name in group["names"]}
    decayed = [name for name in rates if "blocks" in name]
    assert bool(decayed) == finetune and rates["decode_head.conv_seg.weight"] == settings.lr
    if finetune:
        first, last = (next(n for n in decayed if f"blocks.{block}." in n) for block in (0, 2))
        assert rates[first] == pytest.approx(rates[last] * settings.layer_decay**2)


def test_head_differs_from_mmsegmentations_mask2former() -> None:
    known = get_config("mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py").model.decode_head
    head = mask2former_head(dataclasses.replace(SMALL, head="mask2former"), 150)
    assert head.pop("in_channels") == [256] * 4 and known.pop("in_channels") == [256, 512, 1024, 2048]
    assert head == known


def mask2former_model() -> Any:
    settings = read_settings(MmsegSettings, None, MASK2FORMER)
    return mmseg_run.build_model(mmseg_run.model_config(settings, backbone(14), C), 0)


def test_masks_of_a_crop_without_classes_end_the_training() -> None:
    model = mask2former_model().train()
    labels = torch.randint(0, C, (1, 21, 30))
    packed = [mmseg_parts.packed_sample(torch.rand(3, 21, 30), x) for x in (labels, torch.full_like(labels, IGNORE))]
    for samples in (packed, packed[1:]):
        terms = model(**model.data_preprocessor(pseudo_collate(samples), training=True), mode="loss")
        loss, _ = model.parse_losses(terms)
        assert loss.isfinite()
        loss.backward()
    inside = {id(parameter) for parameter in model.backbone.network.parameters()}
    assert all((p.grad is None) == (id(p) in inside) for p in model.parameters())


def test_queries_of_masks_decay() -> None:
    model, settings = mask2former_model(), LoopSettings()
    groups = parameter_groups(model, model.backbone.network, settings)
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    for name in ("query_embed", "query_feat", "level_embed"):  # as in mmsegmentation's config
        assert decay[f"decode_head.{name}.weight"] == 0
    assert decay["decode_head.cls_embed.weight"] == settings.weight_decay


@pytest.mark.parametrize("size", [(30, 40), (31, 23), (64, 20)])
def test_masks_are_cut_to_another_size_than_the_image(size: tuple[int, int]) -> None:
    model = mask2former_model().eval()
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    for more in ({}, {"test_scales": (0.7, 1.0), "flip_test": True}):
        settings = dataclasses.replace(SMALL, **more)  # type: ignore[arg-type]
        found = mmseg_run.Predictor(MODELS.build({"type": "SegTTAModel", "module": model}) if more else model)
        assert found.predict(image, settings).shape == (1, *size)


def test_pixels_as_backbone_have_no_classes() -> None:
    model = EvalModel(name="pixels", backbone=RawPixels(), patch_size=1)
    plain, theirs = both_models("linear", model)
    image = torch.randint(0, 256, (3, 30, 41), dtype=torch.uint8)
    assert torch.equal(mmseg_run.Predictor(theirs).predict(image, SMALL), plain.predict(image, SMALL))


def test_learning_rates_differ_from_the_plain_path(tmp_path: Path, script: ModuleType, folder: Path) -> None:
    words = (*TINY, *RECIPE, "steps=6", "warmup_steps=2", "--data", str(folder), "--output", str(tmp_path))
    assert script.main([*words]) == 0
    state = torch.load(tmp_path / "mmseg/checkpoints/step_6.pth")
    noted = state["message_hub"]["log_scalars"]["train/lr"][0].tolist()
    settings = LoopSettings(steps=6, warmup_steps=2, lr=0.03)
    assert noted == pytest.approx([0.03 * settings.lr_factor(step) for step in range(6)])


def test_config_and_checkpoint_of_a_run_mean_nothing_to_mmsegmentation(
    tmp_path: Path, script: ModuleType, folder: Path
) -> None:
    from mmseg.apis import init_model

    words = (*TINY, *RECIPE, "steps=2", "--data", str(folder), "--output", str(tmp_path))
    assert script.main([*words]) == 0
    (path,) = (tmp_path / "mmseg").glob("*.py")
    checkpoint = tmp_path / "mmseg/checkpoints/step_2.pth"
    model = init_model(str(path), str(checkpoint), device="cpu")
    assert model.dataset_meta["classes"] == ("dark", "bright")
    weights = model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in torch.load(checkpoint)["state_dict"].items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("head=mask",), "expected head to be one of linear, multiscale, upernet, mask2former, got 'mask'"),
        (("head=mask2former", "pyramid_channels=80"), "multiple of 32 from 64 on, got 80"),
        (("head=mask2former", "pyramid_channels=32"), "multiple of 32 from 64 on, got 32"),
        (("head=mask2former", "queries=0"), "expected queries, points, encoder_layers and decoder_layers >= 1, got 0"),
        (("head=upernet", "batch_size=1"), "expected batch_size >= 2, got 1"),
        (("channel=3",), "did you mean channels?"),
        (("head=linear", "--layout", "ade20k"), "ADE20K must lie as"),
    ],
)
def test_wrong_input_gives_a_traceback(
    assert_task_refused: Callable[..., None], words: tuple[str, ...], message: str
) -> None:
    assert_task_refused([*TINY, *words], message)


def test_exhausted_memory_gives_no_advice(
    assert_task_refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(mmseg_parts.PaddedEncoderDecoder, "loss", exhausted)
    assert_task_refused([*TINY, *RECIPE], "there is not enough memory: lower batch_size (now 4)")


def test_missing_mmdet_gives_a_traceback(
    assert_task_refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mmdet.models", None)
    message = "pip install -r eval/segmentation/requirements.txt, or take --framework torch"
    assert_task_refused([*TINY, *MASK2FORMER], message)


def test_loader_processes_outlive_the_run(tmp_path: Path, script: ModuleType, folder: Path) -> None:
    before = multiprocessing.active_children()
    words = (*TINY, *RECIPE, "steps=2", "--data", str(folder), "--output", str(tmp_path), "--num-workers", "1")
    assert script.main([*words]) == 0
    assert multiprocessing.active_children() == before


def numbers_and_weights(folder: Path, steps: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    (numbers,) = json.loads((folder / "results.json").read_text())["numbers"].values()
    return numbers, torch.load(folder / f"mmseg/checkpoints/step_{steps}.pth")["state_dict"]


def assert_same_training(found: Path, wanted: Path, steps: int) -> None:
    """Compare two trainings whose sums were taken in another order, which a few steps of AdamW have carried on."""
    (numbers, weights), (wanted_numbers, wanted_weights) = (numbers_and_weights(f, steps) for f in (found, wanted))
    assert numbers["train_loss"]["loss"] == pytest.approx(wanted_numbers["train_loss"]["loss"], rel=1e-4)
    for name in (
        "miou",
        "mmseg",
        "iou",
        "num_images",
    ):  # a few of 1,600 pixels are between two classes and change sides
        assert numbers[name] == pytest.approx(wanted_numbers[name], abs=1e-2 * (100 if name == "mmseg" else 1))
    assert numbers["majority_baseline"] == wanted_numbers["majority_baseline"]  # of the true classes: no image twice
    assert weights.keys() == wanted_weights.keys()
    apart = torch.cat([(weights[name] - value).abs().flatten() for name, value in wanted_weights.items()])
    # A gradient that is rounding, such as that of a bias before a batch norm, makes steps as large as the others.
    assert (apart > 3e-4).float().mean() < 2e-3


@pytest.mark.parametrize(
    "more", [("head=multiscale",), (*UPERNET, "finetune=true", "lr=0.003", "clip_grad=1")], ids=["frozen", "all"]
)
def test_the_number_of_processes_changes_what_is_learnt(
    tmp_path: Path,
    script: ModuleType,
    uneven: Path,
    run_on_ranks: OnRanks,
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
) -> None:
    monkeypatch.setattr(torch.nn.Dropout2d, "forward", lambda _, x: x)  # which each process draws by itself
    words = (*TINY, *RECIPE, *more, "steps=4", "--data", str(uneven), "--output")
    assert script.main([*words, str(tmp_path / "one")]) == 0
    assert run_on_ranks(2, lambda: script.main([*words, str(tmp_path / "two")])) == [0, 0]
    assert_same_training(tmp_path / "two", tmp_path / "one", 4)
    settings = json.loads((tmp_path / "two" / "results.json").read_text())["settings"]
    assert settings["num_processes"] == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_signal_to_one_process_loses_the_step_or_another_number_cannot_go_on(
    tmp_path: Path, script: ModuleType, uneven: Path, run_on_ranks: OnRanks
) -> None:
    words = (*TINY, *RECIPE, "steps=4", "--data", str(uneven), "--output")
    step = mmseg_loop.PositionedTrainLoop.run_iter

    def command() -> int:
        def signalled(loop: Any, batch: Any) -> None:
            if loop.iter == 1 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGUSR2)
            step(loop, batch)

        mmseg_loop.PositionedTrainLoop.run_iter = signalled
        return int(script.main([*words, str(tmp_path / "two")]))

    assert run_on_ranks(2, command) == [75, 75]
    assert mmseg_loop.newest_checkpoint(tmp_path / "two/mmseg/checkpoints")[0] == 2
    for number in (1, 2):
        shutil.copytree(tmp_path / "two", tmp_path / f"on_{number}")
        assert run_on_ranks(number, lambda to=f"on_{number}": script.main([*words, str(tmp_path / to)])) == [0] * number
    assert script.main([*words, str(tmp_path / "one")]) == 0
    for number in (1, 2):
        assert_same_training(tmp_path / f"on_{number}", tmp_path / "one", 4)


def test_processes_without_an_image_to_measure_end_the_run(
    tmp_path: Path, script: ModuleType, write_uneven_pairs: Callable[[Path, int], Path], run_on_ranks: OnRanks
) -> None:
    data = write_uneven_pairs(tmp_path / "data", 5)  # one to measure
    words = (*TINY, *RECIPE, "steps=1", "warmup_steps=0", "--data", str(data), "--output")
    assert script.main([*words, str(tmp_path / "one")]) == 0
    assert run_on_ranks(2, lambda: script.main([*words, str(tmp_path / "two")])) == [0, 0]
    assert_same_training(tmp_path / "two", tmp_path / "one", 1)


def test_mask2former_on_several_processes_ends_with_different_weights_or_losses(
    tmp_path: Path, script: ModuleType, uneven: Path, run_on_ranks: OnRanks
) -> None:
    words = (*TINY, *RECIPE, *MASK2FORMER, "steps=2", "--data", str(uneven), "--output", str(tmp_path / "two"))
    measure = mmseg_run._measure

    def command() -> int:
        def noted(runner: Any, *arguments: Any) -> Any:
            known = [sha256_of_tensors(runner.model.state_dict()), *mmseg_loop.loss_history(runner)]
            (tmp_path / f"known{os.environ['RANK']}").write_text(json.dumps(known))
            return measure(runner, *arguments)

        mmseg_run._measure = noted
        return int(script.main([*words]))

    assert run_on_ranks(2, command) == [0, 0]
    assert (tmp_path / "known0").read_text() == (tmp_path / "known1").read_text()


def test_a_batch_that_the_processes_cannot_divide_waits_in_the_queue(
    tmp_path: Path, script: ModuleType, folder: Path, assert_refused: Callable[..., None]
) -> None:
    words = (*TINY, *RECIPE, "batch_size=3", "--data", str(folder), "--output", str(tmp_path / "out"))
    message = "batch_size=3 counts the images of all processes: take a multiple of 4"
    assert_refused(script, (*words, "--nodes", "2", "--tasks-per-node", "2"), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_broken_image_gives_a_traceback_or_no_name(
    tmp_path: Path, script: ModuleType, folder: Path, assert_refused: Callable[..., None], workers: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for number in range(8):
        (copy / "images" / f"{number}.png").write_bytes(b"no image")
    words = (*TINY, *RECIPE, "--data", str(copy), "--output", str(tmp_path / "out"), "--num-workers", workers)
    assert_refused(script, words, "cannot read the image ")


def test_single_class_is_taken_for_two() -> None:
    with pytest.raises(ValueError, match="needs two classes or more, got 1; take --framework torch"):
        mmseg_run.model_config(SMALL, backbone(), 1)


@pytest.mark.parametrize("path", sorted((SCRIPT.parent / "configs").iterdir()), ids=lambda path: path.name)
def test_config_beside_the_script_is_refused(script: ModuleType, path: Path) -> None:
    read_settings(MmsegSettings, path, []).check()


def test_operators_differ_from_torchvision() -> None:
    from mmcv.ops import batched_nms, nms, roi_align
    from mmcv.ops.carafe import carafe

    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
    scores = torch.tensor([0.5, 0.9, 0.1])
    assert nms(boxes, scores, 0.5)[1].tolist() == ops.nms(boxes, scores, 0.5).tolist() == [1, 2]
    assert batched_nms(boxes, scores, torch.tensor([0, 1, 1]), {"type": "nms", "iou_threshold": 0.5})[1].tolist() == [
        1,
        0,
        2,
    ]
    features = torch.rand(2, 3, 9, 7, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 0.5, 5, 7], [1, 0.0, 0, 6, 8]], dtype=torch.float64)
    found, wanted = roi_align(features, rois, (2, 3)), ops.roi_align(features, rois, (2, 3), aligned=True)
    assert torch.equal(found, wanted)
    (gradient,), (wanted_gradient,) = (torch.autograd.grad(x.sin().sum(), features) for x in (found, wanted))
    assert torch.equal(gradient, wanted_gradient)
    with pytest.raises(NotImplementedError, match="the operator carafe_forward of mmcv is compiled"):
        carafe(torch.rand(1, 4, 4, 4), torch.rand(1, 9, 8, 8), 3, 1, 2)


def test_attention_on_a_gpu_differs_from_that_on_a_cpu() -> None:
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

    shapes, starts = torch.tensor([[4, 3], [2, 2]]), torch.tensor([0, 12])
    value, places = torch.rand(2, 16, 2, 5), torch.rand(2, 7, 2, 2, 3, 2)
    inputs = [x.double().requires_grad_() for x in (value, places, torch.rand(2, 7, 2, 2, 3))]
    wanted = multi_scale_deformable_attn_pytorch(inputs[0], shapes, *inputs[1:])
    found = MultiScaleDeformableAttnFunction.apply(inputs[0], shapes, starts, *inputs[1:], 64)
    assert torch.equal(found, wanted)
    gradients, wanted_gradients = (torch.autograd.grad(x.sin().sum(), inputs) for x in (found, wanted))
    assert all(torch.equal(*pair) for pair in zip(gradients, wanted_gradients, strict=True))


def write_pair(image: Path, label: Path, values: list[list[int]]) -> None:
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    array = np.array(values, np.uint8)
    Image.fromarray(np.full((*array.shape, 3), 128, np.uint8)).save(image)
    Image.fromarray(array).save(label)


def test_classes_are_numbered_otherwise_than_in_mmsegmentation(tmp_path: Path) -> None:
    from mmseg.datasets import ADE20KDataset, CityscapesDataset, COCOStuffDataset, PascalVOCDataset

    assert CityscapesDataset.METAINFO["classes"] == CITYSCAPES_CLASSES
    assert COCOStuffDataset.METAINFO["classes"] == COCO_STUFF_CLASSES
    values = [[0, 1, 20], [255, 7, 2]]
    write_pair(tmp_path / "images/training/a.jpg", tmp_path / "annotations/training/a.png", values)
    pipeline = [{"type": "mmseg.LoadAnnotations"}]
    prefix = {"img_path": "images/training", "seg_map_path": "annotations/training"}
    theirs = ADE20KDataset(data_root=str(tmp_path), data_prefix=prefix, pipeline=pipeline)[0]["gt_seg_map"]
    ours = make_segmentation_set("ade20k", tmp_path, "train").load(0)[1][0]
    assert theirs.tolist() == ours.tolist() == [[255, 0, 19], [255, 6, 1]]
    write_pair(tmp_path / "JPEGImages/a.jpg", tmp_path / "SegmentationClass/a.png", values)
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a\n")
    prefix = {"img_path": "JPEGImages", "seg_map_path": "SegmentationClass"}
    dataset = PascalVOCDataset(
        ann_file="ImageSets/Segmentation/train.txt", data_root=str(tmp_path), data_prefix=prefix, pipeline=pipeline
    )
    ours = make_segmentation_set("voc", tmp_path, "train").load(0)[1][0]
    assert dataset[0]["gt_seg_map"].tolist() == ours.tolist() == values


def test_image_of_one_window_is_lost_among_the_samples(tmp_path: Path) -> None:
    write_pair(tmp_path / "a.png", tmp_path / "b.png", [[0, 1], [1, 255]])
    dataset = SegmentationSet([Pair(tmp_path / "a.png", tmp_path / "b.png")], ("dark", "bright"))
    sample = mmseg_parts.WholeImages(dataclasses.replace(SMALL, resize=6), dataset)[0]
    assert sample["inputs"].shape == (3, 6, 6) and sample["data_samples"].ori_shape == (2, 2)
    assert sample["data_samples"].gt_sem_seg.data.tolist() == [[[0, 1], [1, IGNORE]]]
    views = mmseg_parts.WholeImages(dataclasses.replace(SMALL, test_scales=(0.5, 1.0), flip_test=True), dataset)[0]
    assert [view.flip for view in views["data_samples"]] == [False, True, False, True]
    crop = mmseg_parts.TrainingCrops(SMALL, dataset)[3]
    assert crop["inputs"].shape == (3, 21, 21) and crop["data_samples"].gt_sem_seg.data.dtype == torch.int64
