"""Images in a folder that `save_to_disk` of Hugging Face's `datasets` wrote: its layout, written here by pyarrow."""

from __future__ import annotations

import io
import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.data.datasets.arrow_images import ArrowImages
from dinov2_equi.data.datasets.base import DatasetError, UnreadableImageError
from dinov2_equi.data.datasets.make import make_dataset

arrow = pytest.importorskip("pyarrow")

LABEL = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)).save(file, "png")
    return file.getvalue()


def write_split(folder: Path, seeds: list[int], *, num_files: int = 1, features: dict[str, object] = LABEL) -> Path:
    """Write images of these seeds, of class seed % 2, in batches of two rows."""
    folder.mkdir(parents=True)
    files = [f"data-{number:05d}-of-{num_files:05d}.arrow" for number in range(num_files)]
    for number, file in enumerate(files):
        part = seeds[number * len(seeds) // num_files : (number + 1) * len(seeds) // num_files]
        images = [{"bytes": png(seed), "path": None} for seed in part]
        image_type = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
        columns = {"image": arrow.array(images, image_type), "label": arrow.array([seed % 2 for seed in part])}
        table = arrow.table(columns)
        with arrow.ipc.new_stream(str(folder / file), table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file} for file in files]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"image": {"_type": "Image"}, **features}}))
    return folder


@pytest.mark.parametrize("num_files", [1, 3])
def test_images_and_classes_of_a_split_in_any_order(tmp_path: Path, num_files: int) -> None:
    dataset = make_dataset(str(write_split(tmp_path / "pets", list(range(7)), num_files=num_files)))
    assert isinstance(dataset, ArrowImages) and len(dataset) == 7
    assert dataset.targets == [0, 1, 0, 1, 0, 1, 0] and dataset.classes == ["cat", "dog"]
    for index in (6, 0, 3, 2):
        expected = np.asarray(Image.open(io.BytesIO(png(index))))
        assert np.array_equal(dataset.load(index), expected)
        assert np.array_equal(dataset.load_tensor(index).permute(1, 2, 0).numpy(), expected)
    assert dataset.name(6) == "pets/6"
    with pytest.raises(IndexError, match="holds 7 images"):
        dataset.load(7)


def test_one_of_several_splits_is_named(tmp_path: Path) -> None:
    write_split(tmp_path / "train", [1, 2])
    write_split(tmp_path / "test", [3])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(make_dataset(str(tmp_path))) == 2
    assert np.array_equal(
        make_dataset(f"huggingface:path={tmp_path}:split=test").load(0), Image.open(io.BytesIO(png(3)))
    )
    with pytest.raises(DatasetError, match="no split 'val'; its splits are train, test"):
        ArrowImages(tmp_path, "val")


def test_numbers_without_names_are_classes_too(tmp_path: Path) -> None:
    dataset = ArrowImages(write_split(tmp_path / "x", [2, 4], features={"label": {"dtype": "int64", "_type": "Value"}}))
    assert dataset.targets == [0, 0] and dataset.classes == ["0"]
    assert ArrowImages(write_split(tmp_path / "y", [2, 4], features={})).targets is None


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_forked_process_reads_what_its_parent_has_opened(tmp_path: Path) -> None:
    dataset = ArrowImages(write_split(tmp_path / "x", [1, 2, 3]))
    dataset.load(0)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert np.array_equal(pool.apply(dataset.load, (2,)), dataset.load(2))


def test_faults_say_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_split(tmp_path / "x", [1], features={"picture": {"_type": "Image"}})
    for arguments, message in (
        ({}, r"2 columns of images \(image, picture\).*name one, as in huggingface:path"),
        ({"column": "imege"}, "no column 'imege' .did you mean 'image'..; its columns are image, picture"),
        ({"column": "image", "label": "kind"}, "no column 'kind'"),
        ({"split": "train"}, "is a single split; leave out split=train"),
    ):
        with pytest.raises(DatasetError, match=message):
            ArrowImages(folder, **arguments)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="is no data set of Hugging Face's"):
        ArrowImages(tmp_path)
    empty = write_split(tmp_path / "bad", [1])
    (empty / "data-00000-of-00001.arrow").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match="cannot be read.*Save the data set again"):
        ArrowImages(empty)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetError, match="needs the package pyarrow: pip install pyarrow"):
        ArrowImages(folder, column="image")


def test_a_row_with_a_path_alone_is_that_file_and_an_empty_row_is_a_bad_image(tmp_path: Path) -> None:
    folder = write_split(tmp_path / "x", [1, 2])
    (tmp_path / "x" / "a.png").write_bytes(png(5))
    image_type = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    rows = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}, None]
    table = arrow.table({"image": arrow.array(rows, image_type), "label": arrow.array([0, 1, 1])})
    with arrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    dataset = ArrowImages(folder)
    assert np.array_equal(dataset.load(0), Image.open(io.BytesIO(png(5))))
    for index in (1, 2):
        with pytest.raises(UnreadableImageError, match=f"x/{index} holds no image"):
            dataset.load_tensor(index)
