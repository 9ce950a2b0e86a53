"""Labelled images for classification harnesses: a data set as tensors, and labels that mean the same in two sets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2_equi.data.datasets.base import DatasetError, ImageDataset
from dinov2_equi.data.transforms import EvalTransform


class _TransformedImages(Dataset[Tensor]):
    """The images of a data set, transformed, in their order."""

    def __init__(self, dataset: ImageDataset, transform: EvalTransform) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.dataset.load_tensor(index, self.transform.resize))


def image_batches(
    dataset: ImageDataset, transform: EvalTransform, *, batch_size: int, num_workers: int = 0
) -> DataLoader[Tensor]:
    """Return a loader of [b, 3, H, W] float32 batches in [0, 1], in the order of the data set."""
    return DataLoader(_TransformedImages(dataset, transform), batch_size=batch_size, num_workers=num_workers)


def matching_labels(train: ImageDataset, test: ImageDataset) -> tuple[Tensor, Tensor]:
    """Return the labels of both sets, [R] and [n] int64, one number for one class name.

    A test set may lack classes of the training set, as ImageNet-A and -R do; each set on its own would then number its
    classes differently. Test classes that are called 0, 1, 2, ... where those of the training set are not, as in
    ImageNet-V2, are the numbers of the training classes in their order.

    Raises:
        DatasetError: if a set has no classes, or the test set has a class that the training set lacks.
    """
    for name, dataset in (("training", train), ("test", test)):
        if dataset.targets is None:
            raise DatasetError(f"the {name} images have no classes; give a folder with one sub-folder a class")
    assert train.targets is not None and test.targets is not None
    number = {name: index for index, name in enumerate(train.classes)}
    if not any(name in number for name in test.classes):
        number |= {str(index): index for index in range(len(train.classes))}
    unknown = [name for name in test.classes if name not in number]
    if unknown:
        raise DatasetError(
            f"expected every test class among the training classes ({', '.join(train.classes[:10])}, ...), "
            f"got also {', '.join(unknown[:10])}; check that both folders belong together"
        )
    test_labels = [number[test.classes[target]] for target in test.targets]
    return torch.tensor(train.targets), torch.tensor(test_labels)
