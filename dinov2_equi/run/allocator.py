"""The memory allocator of a training process on Linux."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h
_GROWTH = 64 * 2**20  # bytes by which the heap grows at a time
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell the C library to keep what a step frees for the next one; return whether it will.

    By default glibc gives every large block back to the system and asks for it again: the tensors of each step on the
    CPU are paid for with tens of thousands of page faults. The process then stays as large as it was at its peak. A
    choice of the user (`MALLOC_*`, `GLIBC_TUNABLES`, another allocator by `LD_PRELOAD`) is respected, and other C
    libraries are left alone.
    """
    is_chosen = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    if platform.libc_ver()[0] != "glibc" or is_chosen:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    choices = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _GROWTH))
    return all(mallopt(option, value) == 1 for option, value in choices)
