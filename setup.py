"""Package metadata. `make train` and `make test` need no installation; `pip install .` is for use in other projects."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_requirements(name: str) -> list[str]:
    """Return the requirements of a file, without its comments."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def read_version() -> str:
    """Return the version that the package states, without importing it."""
    text = (ROOT / "dinov2_equi" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE)
    assert match is not None
    return match.group(1)


setup(
    name="dinov2_equi",
    version=read_version(),
    description="Self-supervised vision transformers: DINOv2's interface with an equivariance branch",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    packages=find_packages(include=["dinov2_equi", "dinov2_equi.*"]),
    package_data={"dinov2_equi.evaluation": ["templates/*.j2"]},
    install_requires=read_requirements("requirements.txt"),
    extras_require={"dev": read_requirements("requirements-dev.txt")},
)
