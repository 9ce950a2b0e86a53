"""What mmsegmentation needs to know: our backbone, a linear head, images of any size, our data; by registered names.

A config of mmsegmentation's own takes them with `custom_imports = dict(imports=["eval.segmentation.mmseg_parts"])` when
it is started from the root of this repository.
"""

from __future__ import annotations

from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModule
from mmengine.optim import OptimWrapper
from mmengine.structures import PixelData
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from dinov2_equi.data.datasets.segmentation_sets import IGNORE, SegmentationSet
from dinov2_equi.evaluation.dense.feature_pyramid import SimpleFeaturePyramid
from dinov2_equi.evaluation.dense.maps import DenseBackbone, last_blocks, padded_size
from dinov2_equi.evaluation.dense.segmentation import (
    SegmentationAugmentation,
    SegmentationSettings,
    pixel_cross_entropy,
    resized_for_test,
)
from dinov2_equi.evaluation.dense.segmentation_metrics import ConfusionMatrix
from dinov2_equi.evaluation.dense.training import Losses, TrainingSamples, means_over_ranks
from dinov2_equi.evaluation.eval_model import EvalModel
from dinov2_equi.layers.batch_norm import BatchNorm2d
from dinov2_equi.run.load import load_eval_model
from eval.segmentation.mmcv_operators import provide_operators

provide_operators()  # the next imports look for them

from mmseg.models import EncoderDecoder  # noqa: E402
from mmseg.models.decode_heads.decode_head import BaseDecodeHead  # noqa: E402
from mmseg.registry import METRICS, MODELS  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402

PYRAMID_STRIDES = (4, 8, 16, 32)

GATHERED = "gpu"
"""How mmengine gathers what the processes found: through their group, whatever its device; `cpu` would be by files."""


@MODELS.register_module()
class EquiBackbone(BaseModule):
    """Any backbone of ours, DINOv2's, timm's or transformers', as maps for mmsegmentation's heads.

    Takes images normalised with `mean` and `std`, which are of values in [0, 1], whose sides are multiples of
    `size_divisor`; `PaddedEncoderDecoder` sees to that.

    Args:
        weights: the backbone, or the string that names it, see `load_eval_model`.
        num_blocks: the maps are the patch tokens of so many last blocks.
        pyramid_channels: > 0: the maps are a simple feature pyramid of so many channels on the last block.
        frozen: compute it in evaluation mode and without gradients; the pyramid is trained all the same.
        seed: of random weights.

    Raises:
        ValueError: see `load_eval_model` and `DenseBackbone`.
    """

    maps: DenseBackbone | SimpleFeaturePyramid

    def __init__(
        self,
        weights: str | EvalModel,
        *,
        num_blocks: int = 1,
        pyramid_channels: int = 0,
        frozen: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        model = weights if isinstance(weights, EvalModel) else load_eval_model(weights, seed=seed)
        self.mean, self.std = model.mean, model.std
        if pyramid_channels:
            self.maps = SimpleFeaturePyramid(model, PYRAMID_STRIDES, 0, pyramid_channels, is_frozen=frozen)
            self.size_divisor = self.maps.size_divisible
            self.out_channels = [pyramid_channels] * len(PYRAMID_STRIDES)
        else:
            self.maps = DenseBackbone(model, last_blocks(model, num_blocks), is_frozen=frozen)
            self.size_divisor = model.patch_size
            self.out_channels = [patches for patches, _ in self.maps.widths()]

    @property
    def network(self) -> nn.Module:
        """The backbone itself."""
        dense = self.maps.features if isinstance(self.maps, SimpleFeaturePyramid) else self.maps
        return dense.backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the maps [B, C, h, w] of normalised images [B, 3, H, W]: by block, or finest first."""
        if isinstance(self.maps, SimpleFeaturePyramid):
            return tuple(self.maps(images).values())
        return tuple(block.patches for block in self.maps.maps_of_normalized(images))

    def init_weights(self) -> None:
        """Keep the weights; mmengine would have the backbone draw its own anew."""


@MODELS.register_module()
class BatchNormOverRanks(BatchNorm2d):
    """Batch norm over the images of all processes, on CPUs too, where torch's SyncBatchNorm refuses."""

    def __init__(self, num_features: int, eps: float) -> None:
        super().__init__(num_features, has_running_stats=True)
        self.eps = eps


@MODELS.register_module()
class PixelCrossEntropy(nn.Module):
    """The mean cross-entropy over the pixels of all processes; mmsegmentation's is one process's own mean.

    Args:
        loss_weight: factor.
    """

    loss_name = "loss_ce"

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self._weight = loss_weight

    def forward(self, logits: Tensor, labels: Tensor, *, weight: None = None, ignore_index: int = IGNORE) -> Tensor:
        """Return it of logits [B, C, H, W] and labels [B, H, W]."""
        assert weight is None and ignore_index == IGNORE  # as the heads are described
        return self._weight * pixel_cross_entropy(logits, labels)


@MODELS.register_module()
class BatchNormLinearHead(BaseDecodeHead):
    """Batch norm and a linear layer on the maps, one beside the other: the head of `SegmentationModel`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.norm = BatchNorm2d(self.in_channels, has_running_stats=True)

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return logits [B, C, h, w]."""
        logits: Tensor = self.cls_seg(self.norm(self._transform_inputs(inputs)))
        return logits


@MODELS.register_module()
class PaddedEncoderDecoder(EncoderDecoder):
    """Predicts images and windows of any size: filled up to what `EquiBackbone` takes, and the filling cut off."""

    def train_step(self, data: dict[str, Any], optim_wrapper: OptimWrapper) -> Losses:
        """Make a step and return the terms of its loss, as means over all processes."""
        return means_over_ranks(super().train_step(data, optim_wrapper))

    def encode_decode(self, inputs: Tensor, batch_img_metas: list[dict[str, Any]]) -> Tensor:
        """Return logits [B, C, H, W] of normalised images [B, 3, H, W]."""
        height, width = inputs.shape[-2:]
        padded = padded_size((height, width), self.backbone.size_divisor)
        filled = F.pad(inputs, (0, padded[1] - width, 0, padded[0] - height))  # with the mean colour
        metas = [meta | {"img_shape": torch.Size(padded)} for meta in batch_img_metas]
        logits: Tensor = super().encode_decode(filled, metas)
        return logits[..., :height, :width]


@METRICS.register_module()
class ConfusionMetric(BaseMetric):
    """Our measures of mmsegmentation's predictions, under the key `measures`.

    Args:
        num_images: of this process; what its sampler gives beyond them, so that all have as many, is not counted.
    """

    results: list[Tensor]

    def __init__(self, num_images: int) -> None:
        super().__init__(collect_device=GATHERED)
        self._num_left = num_images

    def process(self, data_batch: dict[str, Any], data_samples: list[dict[str, Any]]) -> None:
        """Count the pixels of a batch; the counts of all are kept as one matrix."""
        matrix = self._matrix()
        counted = data_samples[: self._num_left]
        self._num_left -= len(counted)
        for sample in counted:
            predicted, truth = sample["pred_sem_seg"]["data"], sample["gt_sem_seg"]["data"]
            matrix.add(predicted.reshape(truth.shape).cpu(), truth.cpu())
        self.results = [matrix.counts + sum(self.results)]

    def compute_metrics(self, results: list[Tensor]) -> dict[str, Any]:
        """Return the measures of `ConfusionMatrix`."""
        matrix = self._matrix()
        matrix.counts += sum(results)
        return {"measures": matrix.results(self.dataset_meta["classes"])}

    def _matrix(self) -> ConfusionMatrix:
        return ConfusionMatrix(len(self.dataset_meta["classes"]), IGNORE)


class MmsegImages(Dataset[dict[str, Any]]):
    """Images with what mmsegmentation asks of a data set.

    Args:
        settings: of the task.
        data: the images.
    """

    def __init__(self, settings: SegmentationSettings, data: SegmentationSet) -> None:
        self.metainfo = {"classes": data.classes}
        self._settings, self._data = settings, data


class TrainingCrops(MmsegImages):
    """The crops that the plain path trains on, by their position in the training."""

    def __init__(self, settings: SegmentationSettings, data: SegmentationSet) -> None:
        super().__init__(settings, data)
        self._samples = TrainingSamples(SegmentationAugmentation(settings, data), len(data), settings.seed)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return the crop at a position."""
        image, labels = self._samples[position]
        return packed_sample(image, labels, img_shape=image.shape[-2:], ori_shape=image.shape[-2:])


class WholeImages(MmsegImages):
    """Images in the sizes in which they are predicted, with class maps in their own."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an image; lists where it is predicted in more than one size or mirrored."""
        return sample_for_test(*self._data.load(index), self._settings, path=self._data.name(index))


def sample_for_test(
    image: Tensor, labels: Tensor | None, settings: SegmentationSettings, *, path: str = ""
) -> dict[str, Any]:
    """Return an image as mmsegmentation's models and their test-time augmentation take it.

    Args:
        image: uint8 [3, H, W].
        labels: int64 [1, H, W]; None: not known.
        settings: sizes, and whether it is mirrored.
        path: of the image.
    """
    views = []
    for scale in settings.test_scales:
        resized = resized_for_test(image, settings, scale)
        for is_mirrored in (False, True) if settings.flip_test else (False,):
            view = resized.flip(-1) if is_mirrored else resized
            about = {"ori_shape": image.shape[-2:], "img_shape": resized.shape[-2:], "img_path": path}
            views.append(packed_sample(view, labels, **about, flip=is_mirrored, flip_direction="horizontal"))
    if len(views) == 1:
        return views[0]
    return {name: [view[name] for view in views] for name in views[0]}


def packed_sample(image: Tensor, labels: Tensor | None, **about: Any) -> dict[str, Any]:
    """Return an image [3, H, W] in [0, 1] and its classes, int64 [1, h, w], in mmsegmentation's form.

    Args:
        image: what the model is given.
        labels: None: not known.
        about: sizes and the like, see `SegDataSample`.
    """
    sample = SegDataSample(metainfo=about)
    if labels is not None:
        sample.gt_sem_seg = PixelData(data=labels)
    return {"inputs": image, "data_samples": sample}
