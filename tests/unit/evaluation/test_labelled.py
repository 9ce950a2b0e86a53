"""Labels that mean the same in training and test set."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.transforms import EvalTransform
from dinov2_equi.evaluation.labelled import image_batches, matching_labels


class Labelled:
    """Plain images, image i of grey value i."""

    def __init__(self, classes: list[str], targets: list[int] | None) -> None:
        self.classes = classes
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets or [])

    def load(self, index: int) -> Image.Image:
        return Image.new("RGB", (20, 12), (index, index, index))

    def load_tensor(self, index: int, min_short_side: int | None = None) -> Tensor:
        return torch.full((3, 12, 20), index, dtype=torch.uint8)

    def name(self, index: int) -> str:
        return str(index)


def test_a_test_set_that_lacks_a_class_does_not_shift_the_others() -> None:
    train, test = Labelled(["cat", "dog", "owl"], [0, 1, 2, 2]), Labelled(["dog", "owl"], [0, 1, 1])
    train_labels, test_labels = matching_labels(train, test)
    assert train_labels.tolist() == [0, 1, 2, 2]
    assert test_labels.tolist() == [1, 2, 2]


def test_a_class_that_only_the_test_set_has_is_named() -> None:
    with pytest.raises(DatasetError, match="got also emu"):
        matching_labels(Labelled(["cat"], [0]), Labelled(["cat", "emu"], [0, 1]))


@pytest.mark.parametrize("side", ["training", "test"])
def test_images_without_classes_are_refused(side: str) -> None:
    with_classes, without = Labelled(["cat"], [0]), Labelled([], None)
    with pytest.raises(DatasetError, match=f"the {side} images have no classes"):
        matching_labels(*((without, with_classes) if side == "training" else (with_classes, without)))


def test_batches_hold_the_images_in_order() -> None:
    batches = list(image_batches(Labelled(["a"], [0] * 5), EvalTransform((6, 8)), batch_size=2))
    assert [list(batch.shape) for batch in batches] == [[2, 3, 6, 8], [2, 3, 6, 8], [1, 3, 6, 8]]
    torch.testing.assert_close(torch.cat(batches)[:, 0, 0, 0] * 255, torch.arange(5.0))


def test_class_numbers_of_a_test_set_are_sorted_as_words() -> None:
    train = Labelled([f"n{number:02d}" for number in range(12)], list(range(12)))
    test = Labelled(["0", "10", "11", "2"], [0, 1, 2, 3])  # folders in the order of words
    assert matching_labels(train, test)[1].tolist() == [0, 10, 11, 2]
    with pytest.raises(DatasetError, match="got also 12"):
        matching_labels(train, Labelled(["12", "3"], [0, 1]))


def test_numbers_that_are_names_are_taken_for_places() -> None:
    train, test = Labelled(["1", "2", "3"], [0, 1, 2]), Labelled(["2", "3"], [0, 1])
    assert matching_labels(train, test)[1].tolist() == [1, 2]
