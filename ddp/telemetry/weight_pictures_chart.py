"""The first layer's weights as tiles: positive ones in one colour, negative ones in another, by how strong they are.

Drawn as SVG rectangles and not as a bitmap, which the page's content security policy would not show.
"""

from __future__ import annotations

import math
from html import escape

import numpy as np
from numpy.typing import NDArray

from ddp.telemetry.charts import NAMESPACES, Drawing, Key
from ddp.watching.layers import WeightPictures

LEVELS = 8  # of strength
LARGEST_SIDE = 16  # pixels of a drawn tile; larger pictures are averaged
COLUMNS = 8
GAP = 0.12  # between tiles, of their size
TILE = 60.0  # units of the drawing


def weight_pictures_chart(pictures: WeightPictures, columns: int = COLUMNS) -> Drawing:
    """Each picture is scaled by its own largest weight; of several channels (red, green, blue) the mean is drawn."""
    tiles = _tiles(pictures)
    rows = math.ceil(len(tiles) / columns)
    step = TILE * (1 + GAP)
    paths: dict[tuple[str, int], list[str]] = {}
    outlines: list[str] = []
    for number, tile in enumerate(tiles):
        left, top = (number % columns) * step, (number // columns) * step
        outlines.append(f"M{left:.1f} {top:.1f}h{TILE:.0f}v{TILE:.0f}h-{TILE:.0f}z")
        _draw(paths, tile, left, top)
    body = f'<path d="{"".join(outlines)}" fill="none" stroke="var(--line)"/>' + "".join(
        f'<path d="{"".join(parts)}" fill="var(--{colour})" fill-opacity="{level / LEVELS:.3g}"/>'
        for (colour, level), parts in sorted(paths.items())
    )
    width, height = min(columns, len(tiles)) * step - GAP * TILE, rows * step - GAP * TILE
    label = escape(f"weights of {pictures.layer}, {len(tiles)} of {pictures.total}")
    svg = f'<svg viewBox="-1 -1 {width + 2:.1f} {height + 2:.1f}" role="img" aria-label="{label}" {NAMESPACES}>{body}</svg>'
    return Drawing(svg, (Key("positive", "blue", "bar"), Key("negative", "orange", "bar")))


def _tiles(pictures: WeightPictures) -> NDArray[np.float64]:
    """Shape (pictures, height, width), each between -1 and 1."""
    values = np.frombuffer(pictures.values, dtype="<f4").astype(float).reshape(pictures.shape).mean(axis=1)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    factor = math.ceil(max(values.shape[1:]) / LARGEST_SIDE)
    if factor > 1:
        height, width = (math.ceil(side / factor) * factor for side in values.shape[1:])
        padded = np.zeros((len(values), height, width))
        padded[:, : values.shape[1], : values.shape[2]] = values
        values = padded.reshape(len(values), height // factor, factor, width // factor, factor).mean(axis=(2, 4))
    largest = np.abs(values).max(axis=(1, 2), keepdims=True)
    return np.divide(values, largest, out=np.zeros_like(values), where=largest > 0)


def _draw(paths: dict[tuple[str, int], list[str]], tile: NDArray[np.float64], left: float, top: float) -> None:
    height, width = TILE / tile.shape[0], TILE / tile.shape[1]
    for (row, column), value in np.ndenumerate(tile):
        level = round(abs(float(value)) * LEVELS)
        if level:
            place = f"M{left + column * width:.1f} {top + row * height:.1f}h{width:.2f}v{height:.2f}h-{width:.2f}z"
            paths.setdefault(("blue" if value > 0 else "orange", level), []).append(place)
