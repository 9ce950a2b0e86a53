"""A page on what a backbone sees in some images: features as colours, attention, patches alike to a clicked one."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinov2_equi.evaluation.figures import figure_png

_TEMPLATE = "templates/visualization.html.j2"
_SHOWN_SIDE = 448
"""Side of a picture, pixels; a patch becomes a square of a whole number of them."""


@dataclass(frozen=True)
class ImageView:
    """What is shown of one image.

    Attributes:
        name: title.
        image: [3, H, W] in [0, 1].
        pca: [h, w, 3] in [0, 1], features as colours.
        attention: [heads, h, w] of the class token; None for a backbone that does not show it.
        directions: [h * w, d] int8, see `compact_directions`.
    """

    name: str
    image: Tensor
    pca: Tensor
    attention: Tensor | None
    directions: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) patches."""
        return self.pca.shape[0], self.pca.shape[1]


def pca_picture(view: ImageView) -> Image.Image:
    """Return the colours of the patches, large enough to look at."""
    return _enlarged((view.pca.numpy() * 255).round().astype(np.uint8))


def attention_picture(view: ImageView) -> Image.Image | None:
    """Return the mean attention over the heads, and then that of each head, side by side; None without attention."""
    if view.attention is None:
        return None
    maps = [view.attention.mean(dim=0), *view.attention]
    return _side_by_side([_enlarged(_heat(single.numpy())) for single in maps])


def _heat(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return a map as black, red, yellow, white from its least to its 99th percentile, [h, w, 3] uint8."""
    low, high = values.min(), np.quantile(values, 0.99)
    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)[..., None]
    colors = np.clip(3 * share - np.array([0.0, 1.0, 2.0]), 0, 1)
    return np.asarray(255 * colors, dtype=np.uint8)


def _enlarged(pixels: NDArray[np.uint8]) -> Image.Image:
    factor = max(1, _SHOWN_SIDE // max(pixels.shape[:2]))
    return Image.fromarray(pixels.repeat(factor, axis=0).repeat(factor, axis=1))


def _side_by_side(pictures: Sequence[Image.Image], gap: int = 6) -> Image.Image:
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    row = Image.new("RGB", (width, pictures[0].height), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row


def render_page(title: str, views: Sequence[ImageView], equivariance: Figure | None) -> str:
    """Return the page as one self-contained HTML text.

    Args:
        title: the backbone.
        views: images with their maps.
        equivariance: views, targets and reconstructions of a run that has a decoder.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        (resources.files("dinov2_equi.evaluation") / _TEMPLATE).read_text(encoding="utf-8")
    )
    return template.render(
        title=title,
        images=[_fields(view) for view in views],
        equivariance=None if equivariance is None else _base64(figure_png(equivariance)),
    )


def _fields(view: ImageView) -> dict[str, object]:
    photograph = (view.image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    attention = attention_picture(view)
    return {
        "name": view.name,
        "rows": view.grid[0],
        "columns": view.grid[1],
        "dim": view.directions.shape[1],
        "photograph": _png(Image.fromarray(photograph)),
        "pca": _png(pca_picture(view)),
        "attention": None if attention is None else _png(attention),
        "directions": _base64(view.directions.contiguous().numpy().tobytes()),
    }


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return _base64(buffer.getvalue())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
