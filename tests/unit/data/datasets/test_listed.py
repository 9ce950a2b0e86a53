"""Images named by a text list, a table, or a pattern."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dinov2_equi.data.datasets.base import DatasetError
from dinov2_equi.data.datasets.listed import ListedImages, find_images, read_list, read_table
from dinov2_equi.data.datasets.make import make_dataset


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """`photos/a.png`, `photos/b c.png` and `photos/deep/é.png`, 10, 20 and 30 pixels wide."""
    for number, name in enumerate(("a.png", "b c.png", "deep/é.png"), start=1):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10 * number, 9)).save(path)
    return tmp_path / "photos"


def widths(dataset: ListedImages) -> list[int]:
    assert [dataset.load(index).width for index in range(len(dataset))] == [
        dataset.load_tensor(index).shape[2] for index in range(len(dataset))
    ]
    return [dataset.load(index).width for index in range(len(dataset))]


def test_list_keeps_its_order_and_starts_from_its_own_folder(photos: Path) -> None:
    (photos / "list.txt").write_text("# a remark\ndeep/é.png\n\nb c.png\n  a.png  \ndeep/é.png\n", encoding="utf-8")
    dataset = read_list(photos / "list.txt")
    assert widths(dataset) == [30, 20, 10, 30]
    assert dataset.name(1) == "b c.png"
    assert dataset.targets is None and dataset.classes == []
    with pytest.raises(IndexError, match=r"list\.txt holds 4 images"):
        dataset.load(4)


def test_list_with_another_root_and_with_absolute_paths(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"a.png\n{photos / 'b c.png'}\n")
    assert widths(read_list(tmp_path / "list.txt", photos)) == [10, 20]


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_table_with_labels_in_the_order_of_their_values(photos: Path, suffix: str, separator: str) -> None:
    rows = [("label", "x", "path"), ("10", "?", "a.png"), ("9", "?", "b c.png"), ("10", "?", "deep/é.png")]
    (photos / f"t.{suffix}").write_text("\n".join(separator.join(row) for row in rows) + "\n", encoding="utf-8")
    dataset = read_table(photos / f"t.{suffix}")
    assert widths(dataset) == [10, 20, 30]
    assert dataset.classes == ["9", "10"] and dataset.targets == [1, 0, 1]


def test_table_with_named_columns(photos: Path) -> None:
    (photos / "t.csv").write_text('file,kind\n"b c.png",tree\na.png,"oak, young"\n')
    dataset = make_dataset(f"table:path={photos / 't.csv'}:column=file:label=kind")
    assert dataset.classes == ["oak, young", "tree"] and dataset.targets == [1, 0]


def test_parquet_table_gives_what_the_same_csv_gives(photos: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"path": ["deep/é.png", "a.png"], "label": [7, 3]}), photos / "t.parquet")
    dataset = read_table(photos / "t.parquet")
    assert widths(dataset) == [30, 10]
    assert dataset.classes == ["3", "7"] and dataset.targets == [1, 0]


def test_pattern_finds_images_at_any_depth_in_order(photos: Path) -> None:
    (photos / "note.txt").write_text("no image")
    assert widths(find_images(str(photos / "**" / "*"))) == [10, 20, 30]
    assert widths(find_images(str(photos / "?.png"))) == [10]


@pytest.mark.parametrize("name", ["list.txt", "table.csv", "**/*.png", "list:path=", "table:path=", "glob:pattern="])
def test_every_source_is_named_by_one_string(photos: Path, name: str) -> None:
    (photos / "list.txt").write_text("a.png\nb c.png\ndeep/é.png\n", encoding="utf-8")
    (photos / "table.csv").write_text("path\na.png\nb c.png\ndeep/é.png\n", encoding="utf-8")
    files = {"list:path=": "list.txt", "table:path=": "table.csv", "glob:pattern=": "**/*.png"}
    spec = f"{name}{photos / files[name]}" if name in files else str(photos / name)
    assert len(make_dataset(spec)) == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{0}/nothing.txt", "no such file: .*nothing.txt; expected a text file with one path a line"),
        ("{0}/nothing.csv", r"no such file: .*nothing.csv; expected a table \(.csv .tsv .parquet\)"),
        ("list:path={0}", "photos is a folder; expected a text file.*give its path alone"),
        ("list:root={0}", "'list' needs a path; its form is list:path=FILE"),
        ("table:path={0}/t.csv:columm=file", "no key 'columm' .did you mean 'column'"),
        ("table:path={0}/t.csv:column=pat", "no column 'pat' .did you mean 'path'.*its columns are path, kind"),
        ("table:path={0}/t.csv:label=class", "no column 'class'.*its columns are path, kind"),
        ("{0}/short.csv", "line 3 of .*short.csv has 1 columns; expected at least 2"),
        ("{0}/wrong.txt", r"none of 2 paths looked for exists, of the 2 in .*first is .*photos/x/a.png.*root=FOLDER"),
        ("{0}/empty.txt", "empty.txt names no image"),
        ("{0}/bytes.txt", "bytes.txt is no text"),
        ("{0}/bytes.parquet", "bytes.parquet is no Parquet file"),
        ("{0}/*.gif", r"no image for the pattern .*it matches nothing.*, as with \S*photos/\*\*/\*.jpg$"),
        ("{0}/*.txt", r"it matches 3 entries, none an image \(bytes.txt, "),
        ("{0}/lists", r"no image in the folder .*lists or below it.*If train.txt lists the images, give .*train.txt"),
        ("{0}/shards", r"no image in the folder .*For tar shards give .*shards/\*.tar"),
        ("{0}/a.png", "a.png is a file, not a folder"),
    ],
)
def test_faults_say_what_was_found_and_what_to_do(photos: Path, spec: str, message: str) -> None:
    (photos / "t.csv").write_text("path,kind\na.png,tree\n")
    (photos / "short.csv").write_text("x,path\n1,a.png\n2\n")
    (photos / "wrong.txt").write_text("x/a.png\nx/b.png\n")
    (photos / "empty.txt").write_text("# nothing\n")
    (photos / "bytes.txt").write_bytes(b"\xff\xfe\x00\x80" * 9)
    (photos / "bytes.parquet").write_bytes(b"PAR1 no PAR1")
    for folder, file in (("lists", "train.txt"), ("shards", "0.tar")):
        (photos / folder).mkdir()
        (photos / folder / file).write_text("a.png")
    with pytest.raises(DatasetError, match=message):
        make_dataset(spec.format(photos))
