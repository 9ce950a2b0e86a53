"""A backbone over a batch in parts: the numbers of one pass with the activations of a part.

Sinkhorn, KoLeo, VICReg and batch norm look at all images of a step, so gradients of parts cannot simply be added up.
Instead the parts pass the student without a graph, all that follows works on the outputs of the whole batch, and once
the gradients of these outputs are known each part passes again, with a graph and the same random state.

Source: Gao et al., "Scaling deep contrastive learning batch size under memory limited setup", 2021 (gradient caching).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor

from dinov2_equi.fsdp.sharding import keep_gathered_after_backward
from dinov2_equi.layers.block import MicroBatch
from dinov2_equi.models.vision_transformer import DinoVisionTransformer, Features

_CLS, _PATCHES, _BLOCKS = "x_norm_clstoken", "x_norm_patchtokens", "x_norm_blocks"


class BackbonePass:
    """One pass of a backbone over the crops of a batch, whole or in parts.

    Attributes:
        features: one for each crop size, as the backbone returns them. In parts: without the registers and the tokens
            before the last norm, and of all crop sizes but the first the class token alone, since these are as large as
            the activations and no loss reads them.
    """

    def __init__(
        self,
        backbone: DinoVisionTransformer,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        *,
        num_parts: int,
        batch_size: int,
        more_blocks: Sequence[int],
        precision: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Run the pass; under `no_grad` there is nothing to go back through.

        Args:
            backbone: student or teacher.
            crops: [V*B, 3, H, W] for each crop size, crop-major.
            masks: [V*B, N] bool or None for each.
            num_parts: parts of B / num_parts images.
            batch_size: B, a multiple of `num_parts`.
            more_blocks: see `DinoVisionTransformer.forward_features`.
            precision: returns the context in which a part passes again.
        """
        assert batch_size % num_parts == 0
        self._backbone, self._crops, self._masks = backbone, crops, masks
        self._parts = [MicroBatch(index, num_parts, batch_size // num_parts) for index in range(num_parts)]
        self._more_blocks = more_blocks
        self._precision = precision
        if num_parts == 1:
            self.features = self._run(crops, masks)
            return
        self._random = device_random_state(crops[0].device)
        outputs = []
        with torch.no_grad():
            for part in self._parts:
                set_device_random_state(self._random, crops[0].device)
                with _announced(backbone, part):
                    outputs.append(self._run_part(part))
        joined = [_join(tensors, self._parts[0].images) for tensors in zip(*outputs, strict=True)]
        self._leaves = [tensor.requires_grad_(torch.is_grad_enabled()) for tensor in joined]
        self.features = _named(self._leaves, len(crops), len(more_blocks))

    def backward(self) -> None:
        """Carry the gradients of the features on to the parameters; call it once, after those of the losses.

        A whole batch has its graph, and this does nothing.
        """
        if len(self._parts) == 1:
            return
        device = self._crops[0].device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for part in self._parts:
                set_device_random_state(self._random, device)
                with _announced(self._backbone, part):  # also backwards: blocks may run again there
                    self._backward_part(part)

    def _backward_part(self, part: MicroBatch) -> None:
        with self._precision():
            outputs = self._run_part(part)
        keep_gathered_after_backward(self._backbone, part.index + 1 < part.count)  # the next part needs them again
        pairs = [
            (output, _part_of(leaf.grad, part))
            for output, leaf in zip(outputs, self._leaves, strict=True)
            if leaf.grad is not None
        ]
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])

    def _run_part(self, part: MicroBatch) -> list[Tensor]:
        """Return class tokens, patch tokens and further blocks of a part, as `_named` takes them."""
        crops = [_part_of(crop, part) for crop in self._crops]
        masks = [None if mask is None else _part_of(mask, part) for mask in self._masks]
        first, *others = self._run(crops, masks)
        return [first[_CLS], first[_PATCHES], *first.get(_BLOCKS, []), *(item[_CLS] for item in others)]

    def _run(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Features]:
        output = self._backbone(crops, masks=masks, is_training=True, more_blocks=self._more_blocks)
        return cast(list[Features], output)


@contextlib.contextmanager
def _announced(backbone: DinoVisionTransformer, part: MicroBatch) -> Iterator[None]:
    """Let the blocks draw the images to drop for the whole batch while the block lasts."""
    blocks = backbone.block_list()
    for block in blocks:
        block.micro_batch = part
    try:
        yield
    finally:
        for block in blocks:
            block.micro_batch = None


def _part_of(rows: Tensor, part: MicroBatch) -> Tensor:
    """Return the rows [V*b, ...] of a part of crop-major rows [V*B, ...]."""
    own: Tensor = rows.unflatten(0, (-1, part.count, part.images))[:, part.index]  # [V, b, ...]
    return own.flatten(0, 1)


def _join(parts: Sequence[Tensor], images: int) -> Tensor:
    """Return crop-major rows [V*B, ...] from those of the parts, [V*b, ...] each with b = `images`."""
    return torch.stack([part.unflatten(0, (-1, images)) for part in parts], dim=1).flatten(0, 2)  # [V, parts, b, ...]


def _named(tensors: Sequence[Tensor], num_sizes: int, num_blocks: int) -> list[Features]:
    """Return the features of each crop size from the tensors of `_run_part`."""
    first: Features = {_CLS: tensors[0], _PATCHES: tensors[1]}
    if num_blocks:
        first[_BLOCKS] = list(tensors[2 : 2 + num_blocks])
    others = tensors[2 + num_blocks :]
    assert len(others) == num_sizes - 1
    return [first, *({_CLS: tensor} for tensor in others)]


def device_random_state(device: torch.device) -> Tensor:
    """Return the state of the random generator of a device, from which stochastic depth draws."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_device_random_state(state: Tensor, device: torch.device) -> None:
    """Put back what `device_random_state` returned for the device."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
