"""Index masks as files, over photographs, and in animations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_equi.data.datasets.video_clips import read_index_mask
from dinov2_equi.evaluation.mask_pictures import (
    MAX_GIF_FRAMES,
    mask_palette,
    max_animation_frames,
    overlay,
    shrink,
    write_animation,
    write_gif,
    write_index_mask,
    write_mp4,
)

GREY = np.full((12, 20, 3), 100, dtype=np.uint8)


def test_colours_are_not_those_of_davis() -> None:
    colours = np.array(mask_palette()).reshape(256, 3)
    expected = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]  # the first of the published palette
    assert colours[:5].tolist() == expected
    assert colours[15].tolist() == [192, 128, 128] and colours[20].tolist() == [0, 64, 128]
    assert len(np.unique(colours, axis=0)) == 256


def test_a_mask_does_not_survive_its_file(tmp_path: Path) -> None:
    mask = np.arange(240, dtype=np.uint8).reshape(12, 20)
    write_index_mask(tmp_path / "deep" / "m.png", mask)
    np.testing.assert_array_equal(read_index_mask(tmp_path / "deep" / "m.png"), mask)


def test_background_and_void_are_tinted() -> None:
    mask = np.zeros((12, 20), dtype=np.uint8)
    mask[2:8, 3:9] = 1
    mask[:, 15:] = 255
    found = overlay(GREY, mask)
    np.testing.assert_array_equal(found[mask != 1], GREY[mask != 1])
    assert found[4, 5].tolist() == [114, 50, 50]  # half way to dark red
    assert found[7, 5].tolist() == [255, 255, 255]  # the line, on the object's side


def test_a_mask_of_another_size_is_laid_beside_its_object() -> None:
    mask = np.zeros((6, 10), dtype=np.uint8)
    mask[:3] = 2
    found = overlay(GREY, mask)
    assert (found[:5] != 100).any(axis=2).all() and (found[6:] == 100).all()


def test_pictures_are_enlarged_or_lose_their_shape() -> None:
    assert shrink(GREY, 40) is GREY
    assert shrink(GREY, 10).shape == (6, 10, 3)


def test_an_animation_lacks_frames(tmp_path: Path) -> None:
    pictures = [np.full((8, 12, 3), 40 * number, dtype=np.uint8) for number in range(5)]
    write_gif(tmp_path / "out" / "a.gif", iter(pictures), frames_per_second=10)
    with Image.open(tmp_path / "out" / "a.gif") as image:
        assert (image.n_frames, image.size, image.info["duration"]) == (5, (12, 8), 100)  # type: ignore[attr-defined]
        image.seek(3)
        assert image.convert("RGB").getpixel((4, 4)) == (120, 120, 120)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.gif"]


def test_half_an_animation_is_left_behind(tmp_path: Path) -> None:
    def broken() -> Iterator[np.ndarray]:
        yield GREY
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gif(tmp_path / "a.gif", broken())
    with pytest.raises(ValueError, match="at least one picture"):
        write_gif(tmp_path / "a.gif", [])
    assert not list(tmp_path.iterdir())


def test_a_film_lacks_frames_or_has_other_colours(tmp_path: Path) -> None:
    encoder = pytest.importorskip("imageio_ffmpeg")
    pictures = [np.full((31, 45, 3), (40 * number, 100, 30), dtype=np.uint8) for number in range(5)]
    path = write_animation(tmp_path / "out" / "a.b", iter(pictures))
    assert path == tmp_path / "out" / "a.b.mp4" and max_animation_frames() is None
    about, *frames = encoder.read_frames(str(path))
    assert about["source_size"] == (46, 32) and about["fps"] == 12 and about["codec"] == "h264"
    found = [np.frombuffer(frame, np.uint8).reshape(32, 46, 3)[4, 4].astype(int) for frame in frames]
    assert len(found) == 5
    for number, colour in enumerate(found):
        assert np.abs(colour - (40 * number, 100, 30)).max() <= 12  # colours are compressed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.b.mp4"]


def test_half_a_film_is_left_behind(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")

    def broken() -> Iterator[np.ndarray]:
        yield GREY
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_mp4(tmp_path / "a.mp4", broken())
    with pytest.raises(ValueError, match="at least one picture"):
        write_mp4(tmp_path / "a.mp4", [])
    assert not list(tmp_path.iterdir())


def test_without_an_encoder_there_is_no_animation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert max_animation_frames() == MAX_GIF_FRAMES
    assert write_animation(tmp_path / "a", [GREY]).read_bytes().startswith(b"GIF")
