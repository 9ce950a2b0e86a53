"""Data sets from the strings that name them in a config."""

from __future__ import annotations

import difflib
import glob
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from dinov2_equi.data.datasets.arrow_images import ArrowImages
from dinov2_equi.data.datasets.base import DatasetError, ImageDataset
from dinov2_equi.data.datasets.channels import ARRAY_SUFFIXES, ChannelFormat, as_channels
from dinov2_equi.data.datasets.folder import ImageFolder
from dinov2_equi.data.datasets.image_net import ImageNet
from dinov2_equi.data.datasets.image_net_22k import ImageNet22k
from dinov2_equi.data.datasets.image_net_variants import CORRUPTED, VARIANTS, image_net_c, image_net_variant
from dinov2_equi.data.datasets.inaturalist import INaturalist2018
from dinov2_equi.data.datasets.listed import (
    IMAGE_SUFFIXES,
    LIST_SUFFIXES,
    TABLE_SUFFIXES,
    find_images,
    read_list,
    read_table,
)
from dinov2_equi.data.datasets.lmdb_images import LmdbImages
from dinov2_equi.data.datasets.mixture import Mixture
from dinov2_equi.data.datasets.piped_shards import DEFAULT_BUFFER, PipedShards
from dinov2_equi.data.datasets.sample_photos import DEFAULT_REGIONS, SamplePhotos
from dinov2_equi.data.datasets.small_photos import SmallPhotos
from dinov2_equi.data.datasets.synthetic import SyntheticImages
from dinov2_equi.data.datasets.tar_shards import TarShards
from dinov2_equi.data.datasets.torchvision_sets import TorchvisionSet

# A colon counts only before `key=`, so that paths may hold colons.
_SEPARATOR = re.compile(r":(?=[A-Za-z_]+=)")
VAL_FOLDERS = ("val", "validation", "test")
MIX = "mix:"
PIPE = "pipe:"
_PIPE_USAGE = "pipe:COMMAND[:buffer=N]"
_MIX_USAGE = "mix:WEIGHT*DATASET + WEIGHT*DATASET + ..., or mix:[{path: DATASET, weight: WEIGHT}, ...]"
_WEIGHT = re.compile(r"([0-9.eE+-]+)\*(.*)", re.DOTALL)
_SIZE = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class _Form:
    """A kind of data set: how its string looks, its keys, and what builds it from key -> text.

    One that searches for images by their names is also told what these end in.
    """

    usage: str
    keys: tuple[str, ...]
    build: Callable[..., ImageDataset]
    searches: bool = False


def make_dataset(spec: str, channels: ChannelFormat | None = None) -> ImageDataset:
    """Return the data set that a string names.

    Its images are RGB, or with `channels` read channel by channel, and `.npy` files are images too.

    `sample_photos[:split=TRAIN|VAL][:regions=N]`, `small_photos[:split=TRAIN|TEST]`,
    `synthetic[:length=N][:size=HxW][:seed=N]`, `ImageNet:split=TRAIN|VAL:root=FOLDER[:extra=FOLDER]`,
    `ImageNetV2|A|R|Sketch:root=FOLDER`, `ImageNetC:root=FOLDER:corruption=NAME:severity=1..5`,
    `ImageNet22k:root=FOLDER`, `iNaturalist2018:split=TRAIN|VAL:root=FOLDER`,
    `torchvision:name=NAME:root=FOLDER[:split=train|val]`, `folder:root=FOLDER`, `list:path=FILE[:root=FOLDER]`,
    `table:path=FILE[:column=NAME][:label=NAME][:root=FOLDER]`, `glob:pattern=PATTERN`, `tar:path=PATTERN[:buffer=N]`,
    `pipe:COMMAND[:buffer=N]`, `lmdb:path=FOLDER`,
    `huggingface:path=FOLDER[:split=NAME][:column=NAME][:label=NAME]`;
    `mix:3*DATASET + 1*DATASET`, or `mix:[{path: DATASET, weight: 3}, {path: DATASET, weight: 1}]`, for several with
    weights. Or a path alone: a folder of images, a text list, a table (CSV, TSV, Parquet), a pattern with wildcards,
    tar shards, a folder that `datasets` or LMDB has written.

    Raises:
        DatasetError: Unknown name or key, a value of the wrong kind, or the data set's own fault (folder missing,
            no images); lists the forms and the nearest name.
    """
    spec = spec.strip()
    if spec.startswith(MIX):
        return _make_mixture(spec, channels)
    dataset = _make_single(spec, IMAGE_SUFFIXES if channels is None else IMAGE_SUFFIXES + ARRAY_SUFFIXES)
    return dataset if channels is None else as_channels(dataset, channels, spec)


def _make_single(spec: str, suffixes: tuple[str, ...]) -> ImageDataset:
    if spec.startswith(PIPE):
        command, _, buffer = spec.removeprefix(PIPE).partition(":buffer=")
        return PipedShards(command, _integer("pipe", "buffer", {"buffer": buffer or str(DEFAULT_BUFFER)}, 1), suffixes)
    name, *fields = _SEPARATOR.split(spec)
    form = _FORMS.get(name)
    if form is not None:
        values = _parse_fields(name, form, fields)
        return form.build(values, suffixes) if form.searches else form.build(values)
    # A name with a separator can only be meant as a path: the folder's own error then says what is missing.
    if "/" in name or os.sep in name or (spec and (Path(spec).expanduser().exists() or _is_pattern(spec))):
        return _of_path(spec, suffixes)
    raise DatasetError(_describe_unknown(spec, name))


def _of_path(path: str, suffixes: tuple[str, ...]) -> ImageDataset:
    """Return what lies at a path; its suffix and wildcards say what it should be."""
    suffix = Path(path).suffix.lower()
    if Path(path).expanduser().is_dir():
        return _of_folder(Path(path).expanduser(), suffixes)
    if suffix == ".tar" or path.endswith((".tar.gz", ".tgz")):
        return TarShards(path, suffixes)
    if _is_pattern(path):
        return find_images(path, suffixes)
    if suffix in LIST_SUFFIXES:
        return read_list(path)
    if suffix in TABLE_SUFFIXES:
        return read_table(path)
    return ImageFolder(path, suffixes)


def _of_folder(folder: Path, suffixes: tuple[str, ...]) -> ImageDataset:
    """Return what lies in a folder: other programs' data sets are told by their files."""
    if (folder / "data.mdb").is_file():
        return LmdbImages(folder)
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return ArrowImages(folder)
    return ImageFolder(folder, suffixes)


def _is_pattern(path: str) -> bool:
    return glob.has_magic(path) and not Path(path).expanduser().exists()


def _make_mixture(spec: str, channels: ChannelFormat | None) -> Mixture:
    """Return the data sets of a mixture; without any weight their sizes are the shares."""
    text = spec.removeprefix(MIX).strip()
    entries = _listed_parts(spec, text) if text.startswith("[") else _summed_parts(text)
    parts, weights = [], []
    for name, weight in entries:
        if not name or name.startswith(MIX):
            raise DatasetError(f"{spec!r}: expected data sets, no mixture among them, as in {_MIX_USAGE}; got {name!r}")
        if weight is not None:
            weights.append(_number(spec, weight))
        parts.append(make_dataset(name, channels))
    if weights and len(weights) != len(parts):
        raise DatasetError(f"{spec!r}: give every data set a weight, or none; the form is {_MIX_USAGE}")
    return Mixture(parts, weights or None)


def _summed_parts(text: str) -> list[tuple[str, str | None]]:
    """Return (name, weight) of `2*A + 1*B`."""
    words = [word.strip() for word in re.split(r"\s\+\s", text)]
    matches = [_WEIGHT.fullmatch(word) for word in words]
    return [(match[2], match[1]) if match else (word, None) for word, match in zip(words, matches, strict=True)]


def _listed_parts(spec: str, text: str) -> list[tuple[str, str | None]]:
    """Return (name, weight) of `[{path: A, weight: 2}, {path: B, weight: 1}]`."""
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DatasetError(f"{spec!r}: the list cannot be read: {' '.join(str(error).split())}") from error
    if not all(isinstance(entry, dict) and "path" in entry and set(entry) <= {"path", "weight"} for entry in entries):
        raise DatasetError(f"{spec!r}: expected a list of entries {{path: DATASET, weight: NUMBER}}; got {entries!r}")
    return [(str(entry["path"]), str(entry["weight"]) if "weight" in entry else None) for entry in entries]


def _number(spec: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < math.inf:
        raise DatasetError(f"{spec!r}: a weight must be a number above 0; got {text!r}")
    return number


def make_train_and_val(
    data: str | None, train: str | None, val: str | None, channels: ChannelFormat | None = None
) -> tuple[ImageDataset, ImageDataset]:
    """Return images to learn from and images to be measured on, as command lines name them.

    Args:
        data: a folder with `train` and one of `VAL_FOLDERS` in it; None where the other two are given.
        train, val: a data set each, see `make_dataset`.
        channels: how their images are read; None: as photographs.

    Raises:
        DatasetError: neither form or both, or a folder is missing.
    """
    if bool(train) != bool(val) or bool(data) == bool(train):
        raise DatasetError("give --data FOLDER with train/ and val/ alone, or both --train and --val")
    if train and val:
        return make_dataset(train, channels), make_dataset(val, channels)
    root = Path(data or "").expanduser()
    found = [root / name for name in VAL_FOLDERS if (root / name).is_dir()]
    if not (root / "train").is_dir() or not found:
        raise DatasetError(
            f"expected {root}/train and {root}/val, each with one sub-folder a class; give another folder, or --train "
            "and --val"
        )
    return make_dataset(str(root / "train"), channels), make_dataset(str(found[0]), channels)


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
    return ImageNet(_root("ImageNet", values), values.get("split", "TRAIN"), values.get("extra") or None)


def _build_image_net_22k(values: Mapping[str, str]) -> ImageDataset:
    return ImageNet22k(_root("ImageNet22k", values))


def _build_lmdb(values: Mapping[str, str]) -> ImageDataset:
    return LmdbImages(_needed("lmdb", "path", values))


def _build_huggingface(values: Mapping[str, str]) -> ImageDataset:
    path = _needed("huggingface", "path", values)
    return ArrowImages(path, values.get("split"), values.get("column"), values.get("label"))


def _build_variant(name: str) -> Callable[[Mapping[str, str]], ImageDataset]:
    return lambda values: image_net_variant(name, _root(name, values))


def _build_image_net_c(values: Mapping[str, str]) -> ImageDataset:
    severity = _integer(CORRUPTED, "severity", values, 1)
    return image_net_c(_root(CORRUPTED, values), _needed(CORRUPTED, "corruption", values), severity)


def _build_inaturalist(values: Mapping[str, str]) -> ImageDataset:
    return INaturalist2018(_root("iNaturalist2018", values), values.get("split", "TRAIN"))


def _build_torchvision(values: Mapping[str, str]) -> ImageDataset:
    if not values.get("name"):
        raise DatasetError(f"data set 'torchvision' needs a name; its form is {_FORMS['torchvision'].usage}")
    return TorchvisionSet(values["name"], _root("torchvision", values), values.get("split", "train"))


def _build_folder(values: Mapping[str, str], suffixes: tuple[str, ...]) -> ImageDataset:
    return ImageFolder(_root("folder", values), suffixes)


def _build_list(values: Mapping[str, str]) -> ImageDataset:
    return read_list(_needed("list", "path", values), values.get("root"))


def _build_table(values: Mapping[str, str]) -> ImageDataset:
    path = _needed("table", "path", values)
    return read_table(path, values.get("column", "path"), values.get("label"), values.get("root"))


def _build_glob(values: Mapping[str, str], suffixes: tuple[str, ...]) -> ImageDataset:
    return find_images(_needed("glob", "pattern", values), suffixes)


def _build_tar(values: Mapping[str, str], suffixes: tuple[str, ...]) -> ImageDataset:
    path = _needed("tar", "path", values)
    return TarShards(path, suffixes, _integer("tar", "buffer", values, 1) if "buffer" in values else None)


_FORMS = {
    "sample_photos": _Form("sample_photos[:split=TRAIN|VAL][:regions=N]", ("split", "regions"), _build_sample_photos),
    "small_photos": _Form("small_photos[:split=TRAIN|TEST]", ("split",), _build_small_photos),
    "synthetic": _Form("synthetic[:length=N][:size=HxW][:seed=N]", ("length", "size", "seed"), _build_synthetic),
    "ImageNet": _Form(
        "ImageNet:split=TRAIN|VAL:root=FOLDER[:extra=FOLDER]", ("split", "root", "extra"), _build_image_net
    ),
    # DINOv2's string names a folder of index files, which are not needed.
    "ImageNet22k": _Form("ImageNet22k:root=FOLDER", ("root", "extra"), _build_image_net_22k),
    **{name: _Form(f"{name}:root=FOLDER", ("root",), _build_variant(name)) for name in VARIANTS if name != CORRUPTED},
    CORRUPTED: _Form(
        f"{CORRUPTED}:root=FOLDER:corruption=NAME[:severity=1]",
        ("root", "corruption", "severity"),
        _build_image_net_c,
    ),
    "iNaturalist2018": _Form("iNaturalist2018:split=TRAIN|VAL:root=FOLDER", ("split", "root"), _build_inaturalist),
    "torchvision": _Form(
        "torchvision:name=CIFAR10|Food101|...:root=FOLDER[:split=train|val]",
        ("name", "root", "split"),
        _build_torchvision,
    ),
    "folder": _Form("folder:root=FOLDER", ("root",), _build_folder, searches=True),
    "list": _Form("list:path=FILE[:root=FOLDER]", ("path", "root"), _build_list),
    "table": _Form(
        "table:path=FILE[:column=NAME][:label=NAME][:root=FOLDER]", ("path", "column", "label", "root"), _build_table
    ),
    "glob": _Form("glob:pattern=PATTERN", ("pattern",), _build_glob, searches=True),
    "tar": _Form("tar:path=PATTERN[:buffer=N]", ("path", "buffer"), _build_tar, searches=True),
    "lmdb": _Form("lmdb:path=FOLDER", ("path",), _build_lmdb),
    "huggingface": _Form(
        "huggingface:path=FOLDER[:split=NAME][:column=NAME][:label=NAME]",
        ("path", "split", "column", "label"),
        _build_huggingface,
    ),
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
    return Path(_needed(name, "root", values))


def _needed(name: str, key: str, values: Mapping[str, str]) -> str:
    """Return the value of a key that must be given."""
    if not values.get(key):
        raise DatasetError(f"data set {name!r} needs a {key}; its form is {_FORMS[name].usage}")
    return values[key]


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
        f"{forms}\n  {_PIPE_USAGE}\n  {_MIX_USAGE}\n  "
        f"the path of a folder of images, of a list ({' '.join(LIST_SUFFIXES)}), of a table "
        f"({' '.join(TABLE_SUFFIXES)}), of tar shards, or a pattern with wildcards"
    )
