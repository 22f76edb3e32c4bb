"""Images in class folders: listing, holding out, decoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedleak.errors import UsageError

SUFFIXES = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])
HELD_OUT = 5  # one image in so many


def class_folders(folder: Path, root: str) -> dict[str, list[Path]]:
    """Class name -> its image files, both in alphabetical order; folders inside a class folder belong to it.

    Args:
        folder: holds a folder for each class. Hidden folders, hidden files and files without an image's suffix are
            skipped.
        root: how the user wrote the key and value that led here, for errors.

    Raises:
        UsageError: there is no class folder, or one has no image.
    """
    classes = {
        entry.name: [
            path
            for path in sorted(entry.rglob("*"))
            if path.suffix.lower() in SUFFIXES
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(entry).parts)
        ]
        for entry in sorted(folder.iterdir())
        if entry.is_dir() and not entry.name.startswith(".")
    }
    if not classes:
        raise UsageError(f"{root}: {folder} has no class folders; put a folder of images a class in it")
    if empty := [name for name, files in classes.items() if not files]:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UsageError(
            f"{root}: class folder {folder / empty[0]}{more} has no images "
            f"({' '.join(sorted(SUFFIXES))}); add some or remove it"
        )
    return classes


def hold_out(classes: dict[str, list[Path]], seed: int) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Split the files of every class into training and test files, at random but always alike for one `seed`.

    One file in `HELD_OUT` is held out, at least one; none of a class with a single file.
    """
    train, test = {}, {}
    generator = torch.Generator().manual_seed(seed)
    for name, files in classes.items():
        held = max(1, len(files) // HELD_OUT) if len(files) > 1 else 0
        order = torch.randperm(len(files), generator=generator).tolist()
        train[name] = [files[index] for index in sorted(order[held:])]
        test[name] = [files[index] for index in sorted(order[:held])]
    return train, test


DEEP = frozenset([".png", ".tif", ".tiff", ".pgm"])


def depth(paths: Sequence[Path]) -> int:
    """How many bits the brightest of the images with more than 8 bits uses: X-rays keep 12 in a file for 16."""
    from PIL import Image

    most = 0
    for path in paths:
        if path.suffix.lower() in DEEP:
            try:
                with Image.open(path) as file:
                    if file.mode.startswith("I"):
                        most = max(most, int(np.asarray(file, dtype=np.int64).max()))
            except Exception:  # Pillow's decoders raise many kinds; decoding will say which image it is
                continue
    return next((bits for bits in (8, 10, 12, 14) if 0 < most < 2**bits), 16)


def decode_all(paths: Sequence[Path], size: int, channels: int, root: str, bits: int = 16) -> Tensor:
    """Read images as uint8 ``[N, channels, size, size]``.

    Each is turned as its EXIF data say, cropped to a square in its centre and scaled bilinearly, with antialiasing.

    Args:
        paths: N image files.
        size: height and width in pixels.
        channels: 3 (RGB) or 1 (grey).
        root: how the user wrote the key and value that led here, for errors.
        bits: that white takes in images of more than 8, see `depth`.

    Raises:
        UsageError: images cannot be read; names the first and says how many.
    """
    from PIL import UnidentifiedImageError

    images = np.empty((len(paths), channels, size, size), dtype=np.uint8)
    broken: list[tuple[Path, str]] = []
    for index, path in enumerate(paths):
        try:
            images[index] = _decode(path, size, channels, bits)
        except Exception as error:  # Pillow's decoders raise many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            broken.append((path, "not an image" if isinstance(error, UnidentifiedImageError) else reason))
    if broken:
        path, reason = broken[0]
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise UsageError(f"{root}: image {path}{more} cannot be read: {reason}; mend or remove it")
    return torch.from_numpy(images)


def _decode(path: Path, size: int, channels: int, bits: int) -> np.ndarray:
    """One image as uint8 ``[channels, size, size]``."""
    from PIL import Image, ImageOps

    mode = "RGB" if channels == 3 else "L"
    with Image.open(path) as file:
        file.draft(mode, (2 * size, 2 * size))  # a large JPEG is decoded at a half, quarter or eighth of its size
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow would cut off at 255 instead of scaling
            deep = np.asarray(image, dtype=np.int64).clip(0, 2**bits - 1)
            image = Image.fromarray((deep >> bits - 8).astype(np.uint8))
        image = ImageOps.fit(image.convert(mode), (size, size), method=Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array.transpose(2, 0, 1) if channels == 3 else array[None]
