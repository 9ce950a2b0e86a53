"""The bad images of all ranks: one list, and one share that all of them judge alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import torch

from dinov2_equi.data.bad_images import BadImage
from dinov2_equi.distributed.collectives import gather_bytes, largest_of_ranks
from dinov2_equi.distributed.env import is_distributed


def gather_bad_images(mine: Sequence[BadImage], device: torch.device) -> list[BadImage]:
    """Return the bad images of all ranks in the order of the ranks, on every rank. Every rank must call it.

    In a step without any it costs one reduction of a number.

    Args:
        mine: Those of this rank.
        device: Where the process group communicates.
    """
    if not is_distributed():
        return list(mine)
    content = json.dumps([asdict(image) for image in mine]).encode() if mine else b""
    length = largest_of_ranks(len(content), device)
    if length == 0:
        return []
    padded = torch.frombuffer(bytearray(content.ljust(length, b"\0")), dtype=torch.uint8)
    texts = [part.numpy().tobytes().rstrip(b"\0") for part in gather_bytes(padded, device)]
    return [BadImage(**image) for text in texts if text for image in json.loads(text)]
