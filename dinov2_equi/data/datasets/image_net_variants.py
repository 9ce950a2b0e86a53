"""ImageNet's other test sets: V2, A, R, Sketch, and the corrupted images of C."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.folder import ImageFolder

CORRUPTED = "ImageNetC"
SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class _Variant:
    """How a test set lies on disk, and where it comes from."""

    layout: str
    """Below root."""

    address: str

    inner: tuple[str, ...] = ()
    """A folder that its archive may put around the classes."""


VARIANTS = {
    "ImageNetV2": _Variant(
        "<class number 0 to 999>/*.jpeg",
        "https://github.com/modestyachts/ImageNetV2",
        ("imagenetv2-matched-frequency-format-val",),
    ),
    "ImageNetA": _Variant(
        "<WordNet name>/*.jpg of 200 classes", "https://github.com/hendrycks/natural-adv-examples", ("imagenet-a",)
    ),
    "ImageNetR": _Variant(
        "<WordNet name>/*.jpg of 200 classes", "https://github.com/hendrycks/imagenet-r", ("imagenet-r",)
    ),
    "ImageNetSketch": _Variant(
        "<WordNet name>/*.JPEG", "https://github.com/HaohanWang/ImageNet-Sketch", ("sketch", "imagenet-sketch")
    ),
    CORRUPTED: _Variant(
        "<corruption>/<severity 1 to 5>/<WordNet name>/*.JPEG", "https://github.com/hendrycks/robustness"
    ),
}
"""By the name of the data set."""


def image_net_variant(name: str, root: Path | str) -> ImageFolder:
    """Return a test set with one folder a class; all of `VARIANTS` but ImageNet-C.

    Args:
        name: of `VARIANTS`.
        root: the folder of the class folders, or the one around it that the archive makes.

    Raises:
        DatasetError: the folder is missing, or holds no classes; says how it must lie and where to get it.
    """
    variant = VARIANTS[name]
    folder = _existing(name, Path(root).expanduser())
    inner = [folder / part for part in variant.inner if (folder / part).is_dir()]
    images = ImageFolder(inner[0] if inner else folder)
    if images.targets is None:
        raise DatasetError(f"{name}: the images in {images.root} lie in no class folders. {_how_it_lies(name)}")
    return images


def image_net_c(root: Path | str, corruption: str, severity: int) -> ImageFolder:
    """Return the images of ImageNet-C of one corruption and severity (1 to 5).

    Raises:
        DatasetError: there is no such folder; names those that there are, how they must lie and where to get them.
    """
    folder = _existing(CORRUPTED, Path(root).expanduser())
    wanted = folder / corruption / str(severity)
    if not wanted.is_dir():
        there = ", ".join(find_corruptions(folder)) or "none"
        raise DatasetError(f"{CORRUPTED}: no folder {wanted}; corruptions there: {there}. {_how_it_lies(CORRUPTED)}")
    return ImageFolder(wanted)


def find_corruptions(root: Path | str) -> dict[str, list[int]]:
    """Return the severities below `root` by corruption, both sorted; empty where nothing lies as in ImageNet-C."""
    found = {}
    for folder in sorted(path for path in Path(root).expanduser().glob("*") if path.is_dir()):
        severities = [severity for severity in SEVERITIES if (folder / str(severity)).is_dir()]
        if severities:
            found[folder.name] = severities
    return found


def _existing(name: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise DatasetError(f"{name}: looked for the folder {folder} and did not find it. {_how_it_lies(name)}")
    return folder


def _how_it_lies(name: str) -> str:
    variant = VARIANTS[name]
    return f"Set root to the folder that holds {variant.layout}; get it from {variant.address}"
