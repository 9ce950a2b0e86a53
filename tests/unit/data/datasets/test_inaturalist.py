"""iNaturalist-2018 in its official layout, made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.make import make_dataset

CATEGORIES = [{"id": 7, "name": "Parus major"}, {"id": 0, "name": "Amanita muscaria"}, {"id": 3, "name": "Lynx lynx"}]


def annotations(*labels: tuple[int, int]) -> dict[str, Any]:
    """Return annotations of (image, category) pairs, not in the order of the images."""
    return {
        "images": [
            {"id": image, "file_name": f"train_val2018/Aves/{category}/{image}.jpg"} for image, category in labels
        ],
        "annotations": [{"id": 1, "image_id": image, "category_id": category} for image, category in reversed(labels)],
        "categories": CATEGORIES,
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, labels in (("train", ((11, 7), (5, 0), (6, 7))), ("val", ((20, 3),))):
        (tmp_path / f"{split}2018.json").write_text(json.dumps(annotations(*labels)))
        for image, category in labels:
            place = tmp_path / "train_val2018" / "Aves" / str(category) / f"{image}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((20, 30, 3), 10 * image, dtype=np.uint8)).save(place)
    return tmp_path


def test_image_has_the_class_of_another(root: Path) -> None:
    train = make_dataset(f"iNaturalist2018:split=TRAIN:root={root}")
    assert train.classes == ["Amanita muscaria", "Lynx lynx", "Parus major"]
    assert train.targets == [2, 0, 2]
    assert [train.name(i) for i in range(3)] == [f"train_val2018/Aves/{place}.jpg" for place in ("7/11", "0/5", "7/6")]
    assert abs(int(train.load_tensor(1).float().mean()) - 50) <= 1  # JPEG
    assert train.load(0).size == (30, 20)
    val = make_dataset(f"iNaturalist2018:split=VAL:root={root}")
    assert (val.classes, val.targets) == (train.classes, [1])
    with pytest.raises(IndexError, match="holds 1 images"):
        val.name(1)


def test_two_classes_of_one_name_become_one(root: Path) -> None:
    content = annotations((11, 7), (5, 0))
    content["categories"] = [{"id": number, "name": "Lynx lynx"} for number in (0, 3, 7)]
    (root / "train2018.json").write_text(json.dumps(content))
    assert make_dataset(f"iNaturalist2018:root={root}").classes == ["0", "3", "7"]


def test_missing_or_wrong_file_gives_no_way_out(root: Path) -> None:
    with pytest.raises(DatasetError, match="splits TRAIN, VAL; got split='test'"):
        make_dataset(f"iNaturalist2018:split=test:root={root}")
    with pytest.raises(DatasetError, match=r"looked for .*nowhere/train2018.json .*Get annotations and images from"):
        make_dataset(f"iNaturalist2018:root={root}/nowhere")
    (root / "train_val2018" / "Aves" / "3" / "20.jpg").unlink()
    with pytest.raises(DatasetError, match=r"names train_val2018/Aves/3/20.jpg, which is not in .*Unpack"):
        make_dataset(f"iNaturalist2018:split=VAL:root={root}")
    for content, fault in (
        ("[]", "TypeError"),
        ("{", "JSONDecodeError"),
        (json.dumps({"images": []}), "'annotations'"),
    ):
        (root / "train2018.json").write_text(content)
        with pytest.raises(DatasetError, match=f"no annotation file of iNaturalist-2018 .*{fault}"):
            make_dataset(f"iNaturalist2018:root={root}")
    (root / "train2018.json").write_text(json.dumps(annotations()))
    with pytest.raises(DatasetError, match="names no image"):
        make_dataset(f"iNaturalist2018:root={root}")
