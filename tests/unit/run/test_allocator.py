"""Memory that a step frees stays with the process, unless the user chose otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]

# 40 MiB lie above the 32 MiB from which glibc always maps and unmaps a block. The heap needs some rounds to settle.
SCRIPT = """
import resource, torch
from dinov2_equi.run.allocator import keep_freed_memory
kept = keep_freed_memory()
for _ in range(20):
    torch.ones(10 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10 * 2**20)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def faults(**environment: str) -> tuple[bool, int]:
    """Return whether memory is kept, and the page faults of the loop, in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k not in ("LD_PRELOAD",)}
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=REPOSITORY, env=clean | environment, capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr
    kept, count = output.stdout.split()
    return kept == "True", int(count)


def test_every_step_pays_for_its_memory_with_page_faults() -> None:
    kept, count = faults()
    assert kept
    assert count < 100  # 102,400 pages otherwise, or 200 huge ones


def test_choice_of_the_user_is_overruled() -> None:
    kept, count = faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept
    assert count > 100
