"""Data sets as plain arrays. Every loader has the same arguments, so that `data=NAME` is all that changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedleak.errors import UsageError

DEFAULT_ROOT = "./data"
DIGIT_NAMES = [str(digit) for digit in range(10)]
FASHION_NAMES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
]  # fmt: skip
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
HELD_OUT = 5  # one image in so many is held out for testing where the data set has no test split of its own
FIXED_SEED = 0  # splits and subsets are part of the data set: they do not move with the run's seed


@dataclass(frozen=True)
class ImageData:
    """A labelled image data set in memory.

    Attributes:
        name: the data set's name.
        train_images: ``[N, C, H, W]`` uint8; the clients' images.
        train_labels: ``[N]`` int64 in [0, classes).
        test_images: ``[M, C, H, W]`` uint8; held out for the shared model's test accuracy.
        test_labels: ``[M]`` int64 in [0, classes).
        class_names: a name for every class, in label order.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: list[str]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def to_float(images: Tensor) -> Tensor:
    """Images uint8 in [0, 255] as float32 in [0, 1], any shape."""
    return images.to(torch.float32) / 255


def digits(
    *, root: str | None = None, download: bool = False, image_size: int | None = 28, limit: int | None = None
) -> ImageData:
    """Handwritten digits from inside scikit-learn (UCI, Alpaydin and Kaynak 1998): real images, no download.

    1,797 images of 8×8 pixels in 17 grey levels, enlarged bilinearly; one in five is held out.

    Args:
        root: not used; it must exist if given.
        download: not used.
        image_size: height and width in pixels.
        limit: at most so many training images, a fixed random subset.

    Raises:
        UsageError: an impossible `image_size` or `limit`, or a `root` that does not exist.
    """
    from sklearn.datasets import load_digits

    if root is not None:
        _folder(root, "data=digits is inside scikit-learn and needs no files: leave data.root=null")
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32).unsqueeze(1) * (255 / 16)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(FIXED_SEED))
    test, train = order[: len(labels) // HELD_OUT], order[len(labels) // HELD_OUT :]
    return _finish(
        "digits", (images[train], labels[train]), (images[test], labels[test]), DIGIT_NAMES, image_size or 8, limit
    )


def _finish(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    class_names: Sequence[str],
    image_size: int | None,
    limit: int | None,
) -> ImageData:
    """Subset, resize, and check what a loader read; images ``[N, C, H, W]`` on the scale [0, 255]."""
    chosen = _subset(len(train[1]), limit)
    (train_images, train_labels), (test_images, test_labels) = (train[0][chosen], train[1][chosen]), test
    labels = torch.cat([train_labels, test_labels])
    if len(train_labels) == 0 or len(test_labels) == 0:
        raise UsageError(f"data={name} has {len(train_labels)} training and {len(test_labels)} test images; needs both")
    if int(labels.min()) < 0 or int(labels.max()) >= len(class_names):
        raise UsageError(
            f"data={name} has labels from {int(labels.min())} to {int(labels.max())} for {len(class_names)} classes; "
            "get its files again"
        )
    return ImageData(
        name,
        _resize(train_images, image_size),
        train_labels,
        _resize(test_images, image_size),
        test_labels,
        list(class_names),
    )


def _subset(count: int, limit: int | None) -> Tensor:
    """Indices of a fixed random subset, in the order of the data set; all of them without a limit."""
    if limit is None:
        return torch.arange(count)
    _whole("data.limit", limit)
    return torch.randperm(count, generator=torch.Generator().manual_seed(FIXED_SEED))[:limit].sort().values


def _resize(images: Tensor, size: int | None) -> Tensor:
    """Square images uint8 ``[N, C, size, size]``; bilinear, with antialiasing where they shrink."""
    if size is not None:
        _whole("data.image_size", size)
        if images.shape[-2:] != (size, size):
            images = torch.cat(
                [
                    torch.nn.functional.interpolate(
                        part.to(torch.float32), size=(size, size), mode="bilinear", antialias=True
                    )
                    for part in images.split(1024)  # in parts: as float32 a whole data set is four times as large
                ]
            )
    return images.round().clamp(0, 255).to(torch.uint8) if images.is_floating_point() else images


def _whole(key: str, value: Any) -> None:
    """Refuse anything but a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{key}={value} is impossible; give a whole number above 0 or null")


def _folder(root: str | None, mend: str) -> Path:
    """The folder that `root` names (`DEFAULT_ROOT` for None), which must exist."""
    path = Path(DEFAULT_ROOT if root is None else root).expanduser()
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise UsageError(f"data.root={path if root is None else root} {what}; {mend}")
    return path
