"""Data sets from the strings that name them in a config."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dinov2_equi.data.datasets.base import DatasetError, ImageDataset
from dinov2_equi.data.datasets.folder import ImageFolder
from dinov2_equi.data.datasets.image_net import ImageNet
from dinov2_equi.data.datasets.inaturalist import INaturalist2018
from dinov2_equi.data.datasets.sample_photos import DEFAULT_REGIONS, SamplePhotos
from dinov2_equi.data.datasets.small_photos import SmallPhotos
from dinov2_equi.data.datasets.synthetic import SyntheticImages
from dinov2_equi.data.datasets.torchvision_sets import TorchvisionSet

# A colon counts only before `key=`, so that paths may hold colons.
_SEPARATOR = re.compile(r":(?=[A-Za-z_]+=)")
VAL_FOLDERS = ("val", "validation", "test")
_SIZE = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class _Form:
    """A kind of data set: how its string looks, its keys, and what builds it from key -> text."""

    usage: str
    keys: tuple[str, ...]
    build: Callable[[Mapping[str, str]], ImageDataset]


def make_dataset(spec: str) -> ImageDataset:
    """Return the data set that a string names.

    `sample_photos[:split=TRAIN|VAL][:regions=N]`, `small_photos[:split=TRAIN|TEST]`,
    `synthetic[:length=N][:size=HxW][:seed=N]`, `ImageNet:split=TRAIN|VAL:root=FOLDER`,
    `iNaturalist2018:split=TRAIN|VAL:root=FOLDER`, `torchvision:name=NAME:root=FOLDER[:split=train|val]`,
    `folder:root=FOLDER`, or the path of a folder of images.

    Raises:
        DatasetError: Unknown name or key, a value of the wrong kind, or the data set's own fault (folder missing,
            no images); lists the forms and the nearest name.
    """
    name, *fields = _SEPARATOR.split(spec.strip())
    form = _FORMS.get(name)
    if form is not None:
        return form.build(_parse_fields(name, form, fields))
    # A name with a separator can only be meant as a path: the folder's own error then says what is missing.
    if "/" in name or os.sep in name or (spec.strip() and Path(spec.strip()).expanduser().exists()):
        return ImageFolder(spec.strip())
    raise DatasetError(_describe_unknown(spec, name))


def make_train_and_val(data: str | None, train: str | None, val: str | None) -> tuple[ImageDataset, ImageDataset]:
    """Return images to learn from and images to be measured on, as command lines name them.

    Args:
        data: a folder with `train` and one of `VAL_FOLDERS` in it; None where the other two are given.
        train, val: a data set each, see `make_dataset`.

    Raises:
        DatasetError: neither form or both, or a folder is missing.
    """
    if bool(train) != bool(val) or bool(data) == bool(train):
        raise DatasetError("give --data FOLDER with train/ and val/ alone, or both --train and --val")
    if train and val:
        return make_dataset(train), make_dataset(val)
    root = Path(data or "").expanduser()
    found = [root / name for name in VAL_FOLDERS if (root / name).is_dir()]
    if not (root / "train").is_dir() or not found:
        raise DatasetError(
            f"expected {root}/train and {root}/val, each with one sub-folder a class; give another folder, or --train "
            "and --val"
        )
    return make_dataset(str(root / "train")), make_dataset(str(found[0]))


def _parse_fields(name: str, form: _Form, fields: list[str]) -> dict[str, str]:
    """Return {key: text} of the parts after the name."""
    values: dict[str, str] = {}
    for field in fields:
        key, _, text = field.partition("=")
        if key not in form.keys:
            raise DatasetError(
                f"data set {name!r} has no key {key!r}{_nearest(key, form.keys)}; its form is {form.usage}"
            )
        if key in values:
            raise DatasetError(f"data set {name!r}: the key {key!r} is given twice; its form is {form.usage}")
        values[key] = text
    return values


def _build_sample_photos(values: Mapping[str, str]) -> ImageDataset:
    return SamplePhotos(
        split=values.get("split", "TRAIN"), regions=_integer("sample_photos", "regions", values, DEFAULT_REGIONS)
    )


def _build_small_photos(values: Mapping[str, str]) -> ImageDataset:
    return SmallPhotos(split=values.get("split", "TRAIN"))


def _build_synthetic(values: Mapping[str, str]) -> ImageDataset:
    size = values.get("size", "96x128")
    match = _SIZE.fullmatch(size)
    if match is None:
        raise DatasetError(f"data set 'synthetic': size must be HxW in pixels, such as 96x128; got {size!r}")
    return SyntheticImages(
        length=_integer("synthetic", "length", values, 64),
        size=(int(match[1]), int(match[2])),
        seed=_integer("synthetic", "seed", values, 0),
    )


def _build_image_net(values: Mapping[str, str]) -> ImageDataset:
    return ImageNet(_root("ImageNet", values), values.get("split", "TRAIN"), values.get("extra"))


def _build_inaturalist(values: Mapping[str, str]) -> ImageDataset:
    return INaturalist2018(_root("iNaturalist2018", values), values.get("split", "TRAIN"))


def _build_torchvision(values: Mapping[str, str]) -> ImageDataset:
    if not values.get("name"):
        raise DatasetError(f"data set 'torchvision' needs a name; its form is {_FORMS['torchvision'].usage}")
    return TorchvisionSet(values["name"], _root("torchvision", values), values.get("split", "train"))


def _build_folder(values: Mapping[str, str]) -> ImageDataset:
    return ImageFolder(_root("folder", values))


_FORMS = {
    "sample_photos": _Form("sample_photos[:split=TRAIN|VAL][:regions=N]", ("split", "regions"), _build_sample_photos),
    "small_photos": _Form("small_photos[:split=TRAIN|TEST]", ("split",), _build_small_photos),
    "synthetic": _Form("synthetic[:length=N][:size=HxW][:seed=N]", ("length", "size", "seed"), _build_synthetic),
    "ImageNet": _Form("ImageNet:split=TRAIN|VAL:root=FOLDER", ("split", "root", "extra"), _build_image_net),
    "iNaturalist2018": _Form("iNaturalist2018:split=TRAIN|VAL:root=FOLDER", ("split", "root"), _build_inaturalist),
    "torchvision": _Form(
        "torchvision:name=CIFAR10|Food101|...:root=FOLDER[:split=train|val]",
        ("name", "root", "split"),
        _build_torchvision,
    ),
    "folder": _Form("folder:root=FOLDER", ("root",), _build_folder),
}


def _integer(name: str, key: str, values: Mapping[str, str], default: int) -> int:
    """Return a whole number from text, or the default where the key is absent."""
    if key not in values:
        return default
    try:
        return int(values[key])
    except ValueError:
        raise DatasetError(f"data set {name!r}: {key} must be a whole number; got {values[key]!r}") from None


def _root(name: str, values: Mapping[str, str]) -> Path:
    """Return the folder given as root."""
    if not values.get("root"):
        raise DatasetError(f"data set {name!r} needs a root; its form is {_FORMS[name].usage}")
    return Path(values["root"])


def _nearest(word: str, known: Mapping[str, _Form] | tuple[str, ...]) -> str:
    """Return " (did you mean 'x'?)" for the nearest known word, or an empty string."""
    by_lower = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[matches[0]]!r}?)" if matches else ""


def _describe_unknown(spec: str, name: str) -> str:
    """Return the error message for a string that is neither a known form nor a path that exists."""
    forms = "\n".join(f"  {form.usage}" for form in _FORMS.values())
    return (
        f"{spec!r} is neither a known data set nor an existing folder{_nearest(name, _FORMS)}. Known forms:\n"
        f"{forms}\n  the path of a folder that holds images"
    )
