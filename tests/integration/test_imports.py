"""What an import does: nothing but define names, and with torch alone where `torch.hub` needs it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

TORCH_ALONE = """
import sys

import torch

ALLOWED = {"torch", "torchgen", "functorch", "dinov2_equi", "hubconf", *sys.stdlib_module_names}
used_by_torch = {name.split(".")[0] for name in sys.modules} - ALLOWED

class OnlyTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ALLOWED:
            raise ImportError(f"{name} is not torch")

for name in [name for name in sys.modules if name.split(".")[0] in used_by_torch]:
    del sys.modules[name]
sys.meta_path.insert(0, OnlyTorch())

import pkgutil
import importlib
import hubconf
import dinov2_equi.hub
import dinov2_equi.layers
import dinov2_equi.models

for package in (dinov2_equi.hub, dinov2_equi.layers, dinov2_equi.models):
    modules = list(pkgutil.walk_packages(package.__path__, package.__name__ + "."))
    assert modules, package
    for module in modules:
        importlib.import_module(module.name)
names = [name for name in vars(hubconf) if name.startswith("dinov2_")]
assert len(names) == 16 + 16
assert all(callable(getattr(hubconf, name)) for name in names)
model = hubconf.dinov2_equi_vits14(img_size=28)
assert model(torch.zeros(1, 3, 28, 42)).shape == (1, 384)
foreign = {name.split(".")[0] for name in sys.modules} - ALLOWED - {"__main__", "__mp_main__"}
assert not foreign & used_by_torch and not foreign, foreign
"""

ENTRY_POINT = """
import logging
import multiprocessing
import sys
import threading
from pathlib import Path

import torch

before = (torch.get_num_threads(), torch.initial_seed(), threading.active_count(), logging.getLogger().handlers[:])
sys.argv = ["train.py", "--no-such-flag", "no.such.key=1"]

import dinov2_equi.run.train

assert before == (
    torch.get_num_threads(), torch.initial_seed(), threading.active_count(), logging.getLogger().handlers
)
assert not multiprocessing.active_children()
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
assert not list(Path.cwd().iterdir())
"""


def run(start_python: Callable[..., subprocess.Popen[str]], *arguments: str, cwd: Path) -> tuple[int, str, str]:
    with start_python(*arguments, cwd=cwd) as process:
        output, errors = process.communicate()
    return process.returncode, output, errors


def test_torch_hub_needs_more_than_torch(start_python: Callable[..., subprocess.Popen[str]]) -> None:
    code, _, errors = run(start_python, "-c", TORCH_ALONE, cwd=REPOSITORY)
    assert code == 0, errors


def test_importing_the_entry_point_starts_something(
    tmp_path: Path, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    find_package = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
    code, output, errors = run(start_python, "-c", find_package + ENTRY_POINT, cwd=tmp_path)
    assert code == 0, errors
    assert (output, errors) == ("", "")


def test_importing_the_package_says_something(start_python: Callable[..., subprocess.Popen[str]]) -> None:
    command = "import sys; import dinov2_equi; assert 'torch' not in sys.modules"
    assert run(start_python, "-W", "error", "-c", command, cwd=REPOSITORY) == (0, "", "")
