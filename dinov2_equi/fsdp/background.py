"""A save that goes on while the training does: tensors copied to the CPU first, then one thread that writes them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class BackgroundJob:
    """A function running in a thread of its own, which the end of the program waits for."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._function()
        except BaseException as error:  # for `wait`, in the thread that has to know
            self._error = error

    @property
    def has_failed(self) -> bool:
        """Whether it has ended with an error."""
        return not self._thread.is_alive() and self._error is not None

    def wait(self) -> None:
        """Return once the function has; raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error


class CpuCopies:
    """Copies of tensors that the training is about to change, in memory that is kept from one save to the next.

    Those of CUDA tensors lie in page-locked memory, to which a GPU copies without stopping for each.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies on the CPU, complete when this returns; they hold until the next call with this name.

        Args:
            name: of the set.
            tensors: by name, on any device.
        """
        copies = {key: self._filled(f"{name}/{key}", tensor) for key, tensor in tensors.items()}
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return copies

    def _filled(self, key: str, tensor: Tensor) -> Tensor:
        kept = self._kept.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[key] = kept
        return kept.copy_(tensor, non_blocking=True)
