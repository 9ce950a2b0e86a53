"""Several right answers an image, against plain loops; and the file of ReaL's labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.folder import ImageFolder
from dinov2_equi.evaluation.accepted_labels import is_right, read_real_labels
from dinov2_equi.evaluation.knn import weighted_knn
from dinov2_equi.evaluation.log_regression import LinearModel

C = 4
ENTRIES = [[0], [], [1, 3], [2], [0, 1, 2, 3]]


@pytest.fixture
def images(tmp_path: Path) -> ImageFolder:
    """Return validation images in class folders, whose order is not that of the numbers."""
    for number, folder in enumerate(("n03", "n01", "n01", "n02", "n00"), start=1):
        place = tmp_path / "val" / folder / f"ILSVRC2012_val_{number:08d}.JPEG"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(place, "JPEG")
    return ImageFolder(tmp_path / "val")


def write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "real.json"
    path.write_text(json.dumps(content))
    return path


def test_labels_go_to_images_in_the_order_of_the_folders(tmp_path: Path, images: ImageFolder) -> None:
    rows, accepted = read_real_labels(write(tmp_path, ENTRIES), images, C)
    found = {
        images.name(row)[-6]: torch.nonzero(line).flatten().tolist()
        for row, line in zip(rows.tolist(), accepted, strict=True)
    }
    assert found == {"1": [0], "3": [1, 3], "4": [2], "5": [0, 1, 2, 3]}  # the second has none and is left out


def test_right_answer_is_another_than_an_accepted_one() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(C, (2, 3, 20), generator=generator)
    accepted = torch.rand(20, C, generator=generator) < 0.4
    found = is_right(predicted, accepted)
    for a in range(2):
        for b in range(3):
            for image in range(20):
                assert found[a, b, image] == accepted[image, predicted[a, b, image]]
    labels = torch.randint(C, (20,), generator=generator)
    one_hot = torch.nn.functional.one_hot(labels, C).bool()
    assert torch.equal(is_right(predicted, labels), is_right(predicted, one_hot))


def test_accuracy_is_not_the_share_of_images_with_an_accepted_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(40, 6, generator=generator), torch.randn(30, 6, generator=generator)
    labels = torch.arange(40) % C
    accepted = torch.rand(30, C, generator=generator) < 0.5
    nearest = [int(torch.cosine_similarity(x[None], train).argmax()) for x in test]
    right = sum(bool(accepted[i, labels[near]]) for i, near in enumerate(nearest))
    assert weighted_knn(train, labels, test, accepted, ks=(1,))[1] == pytest.approx(right / 30)
    model = LinearModel(torch.randn(C, 6, generator=generator), torch.zeros(C))
    right = sum(bool(accepted[i, int((model.weight @ x).argmax())]) for i, x in enumerate(test))
    assert model.accuracy(test, accepted) == pytest.approx(right / 30)
    with pytest.raises(ValueError, match=r"expected accepted classes \[n, 4\] bool, got \[30, 3\]"):
        weighted_knn(train, labels, test, accepted[:, :3], ks=(1,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "expected a list with a list of class numbers"),
        ([[0], 3, [1]], "entry 1 .* class numbers 0 to 3.*got 3"),
        ([[0], [4]], r"entry 1 .*got \[4\]"),
        (ENTRIES[:3], "labels of 3 images; n00/ILSVRC2012_val_00000005.JPEG is none of them"),
        ([[]] * 5, "no label for any of the 5 validation images"),
    ],
)
def test_wrong_file_is_believed(tmp_path: Path, images: ImageFolder, content: object, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_real_labels(write(tmp_path, content), images, C)


def test_missing_file_or_other_names_give_no_way_out(tmp_path: Path, images: ImageFolder) -> None:
    with pytest.raises(OSError, match=r"real.json is at https://github.com"):
        read_real_labels(tmp_path / "nothing.json", images, C)
    Image.new("RGB", (4, 4)).save(tmp_path / "val" / "n00" / "cat.png")
    with pytest.raises(DatasetError, match="expected ILSVRC2012_val_00000001.JPEG and so on, got n00/cat.png"):
        read_real_labels(write(tmp_path, ENTRIES), ImageFolder(tmp_path / "val"), C)
