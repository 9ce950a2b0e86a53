"""Bit flips and truncations of a checkpoint on the disk."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.fault_campaigns.outcome import Outcome, fingerprint
from benchmarks.fault_campaigns.small_run import SmallRun
from dinov2_equi.fsdp.checkpoint import CheckpointStore


def damages(run: SmallRun, folder: Path, count: int, rng: random.Random) -> Outcome:
    """Damage the newest of two checkpoints `count` times: a random bit of a random file, or its end cut off."""
    outcome = Outcome("damage noticed, the checkpoint before it loaded bit for bit")
    store = CheckpointStore(folder)
    before = run.checkpoint(store)
    newest = run.checkpoint(store)
    expected = fingerprint(before.tensors)
    files = sorted(newest.path.iterdir())
    for index in range(count):
        path = rng.choice(files)
        original = path.read_bytes()
        kind, damaged = _damage(original, rng)
        path.write_bytes(damaged)
        outcome.count(kind)
        found = store.load()
        problem = None
        if found.step != before.step:
            problem = "unnoticed"
        elif fingerprint(found.tensors) != expected:
            problem = "wrong tensors were loaded"
        outcome.judge(f"{kind} {index} of {path.name}", problem)
        path.write_bytes(original)
    if store.load().step != newest.step:  # or nothing was ever proved
        outcome.failures.append("the undamaged checkpoint is refused")
    return outcome


def _damage(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return the kind of damage and the damaged bytes; one case in four cuts the file."""
    if rng.random() < 0.25:
        return "truncations", content[: rng.randrange(len(content))]
    damaged = bytearray(content)
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return "bit_flips", bytes(damaged)
