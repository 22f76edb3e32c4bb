"""Thumbnails packed into a few sheets, small enough for one HTML file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fedleak.report.common import evenly

SHEET_SIDE = 2048
SAMPLE = 400  # images that a setting's size is estimated from, before all are encoded
SETTINGS: tuple[tuple[int, int | None], ...] = (
    (96, None),
    (64, None),
    (96, 85),
    (64, 80),
    (48, 80),
    (32, 80),
    (32, 60),
    (32, 40),
    (32, 20),
    (24, 40),
    (16, 25),
)
"""(longest side in pixels, WebP quality or None for lossless), the first that fits the budget is taken."""


@dataclass(frozen=True)
class Sprites:
    """Thumbnails and where they are.

    Attributes:
        sheets: WebP files.
        sizes: (width, height) of each sheet.
        places: for each image (sheet, x, y, width, height) in pixels.
        lossless: whether thumbnails no larger than `side` are exact.
        side: longest side of a thumbnail; larger images were scaled down to it.
    """

    sheets: list[bytes]
    sizes: list[tuple[int, int]]
    places: list[tuple[int, int, int, int, int]]
    lossless: bool
    side: int


def pack(images: Sequence[np.ndarray], *, most_bytes: int) -> Sprites:
    """Pack images into sheets of at most `most_bytes` together, as large and exact as that allows.

    Args:
        images: ``[H, W, 3]`` bytes each, sizes may differ.
        most_bytes: budget of all sheets together; missed only if even the coarsest setting is larger.
    """
    sample = [images[i] for i in evenly(len(images), SAMPLE)]
    share = most_bytes * len(sample) / max(1, len(images))
    for side, quality in SETTINGS:
        last = (side, quality) == SETTINGS[-1]
        if len(sample) < len(images) and not last and sum(map(len, _sheets(sample, side, quality)[0])) > share:
            continue
        files, sizes, places = _sheets(images, side, quality)
        if last or sum(map(len, files)) <= most_bytes:
            break
    return Sprites(files, sizes, places, quality is None, side)


def _sheets(
    images: Sequence[np.ndarray], side: int, quality: int | None
) -> tuple[list[bytes], list[tuple[int, int]], list[tuple[int, int, int, int, int]]]:
    """All images at one setting: files, their sizes, and where each image is."""
    sheets, places = _layout([_shrink(image, side) for image in images])
    files = [_encode(sheet, quality) for sheet in sheets]
    return files, [(sheet.shape[1], sheet.shape[0]) for sheet in sheets], places


def _shrink(image: np.ndarray, side: int) -> np.ndarray:
    height, width = image.shape[:2]
    longest = max(height, width)
    if longest <= side:
        return image
    size = max(1, round(width * side / longest)), max(1, round(height * side / longest))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def _layout(tiles: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[tuple[int, int, int, int, int]]]:
    """Sheets of equal cells, as many as needed."""
    if not tiles:
        return [], []
    cell_height, cell_width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    columns, rows = max(1, SHEET_SIDE // cell_width), max(1, SHEET_SIDE // cell_height)
    per_sheet = columns * rows
    sheets: list[np.ndarray] = []
    places: list[tuple[int, int, int, int, int]] = []
    for first in range(0, len(tiles), per_sheet):
        part = tiles[first : first + per_sheet]
        used = -(-len(part) // columns)
        sheet = np.zeros((used * cell_height, min(columns, len(part)) * cell_width, 3), np.uint8)
        for i, tile in enumerate(part):
            y, x = i // columns * cell_height, i % columns * cell_width
            sheet[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
            places.append((len(sheets), x, y, tile.shape[1], tile.shape[0]))
        sheets.append(sheet)
    return sheets, places


def _encode(sheet: np.ndarray, quality: int | None) -> bytes:
    buffer = io.BytesIO()
    options = {"lossless": True, "quality": 50} if quality is None else {"quality": quality}
    Image.fromarray(sheet).save(buffer, "WEBP", method=2, **options)
    return buffer.getvalue()
