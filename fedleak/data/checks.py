"""What a data set of one's own must be, so that no wrong scale, layout or label passes in silence."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedleak.errors import UsageError

if TYPE_CHECKING:
    from fedleak.data.datasets import ImageData

log = logging.getLogger("fedleak")


def check_images(data: ImageData) -> None:
    """Check a data set as it is made; whole labels of another width become int64.

    Raises:
        UsageError: names the field, what is wrong with it, and the mend.
    """
    names = data.class_names
    if not isinstance(names, list | tuple) or len(names) < 2:
        raise UsageError(f"data={data.name}: class_names={names!r}; give a list of at least two names")
    for split in ("train", "test"):
        images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        _check_pixels(images, f"data={data.name}: {split}_images")
        object.__setattr__(
            data, f"{split}_labels", _checked_labels(labels, len(names), f"data={data.name}: {split}_labels")
        )
        if len(images) != len(labels):
            raise UsageError(f"data={data.name}: {len(images)} {split} images and {len(labels)} labels; give one each")
        if len(images) == 0:
            raise UsageError(f"data={data.name}: no {split} images; give some")
    if data.train_images.shape[1:] != data.test_images.shape[1:]:
        shapes = (list(images.shape[1:]) for images in (data.train_images, data.test_images))
        raise UsageError("data={}: train images are {}, test images {}; make them alike".format(data.name, *shapes))
    absent = sorted(set(range(len(names))) - set(torch.cat([data.train_labels, data.test_labels]).unique().tolist()))
    if absent:
        log.warning(
            "data=%s: %d of %d classes have no image, such as %s (label %d)",
            data.name,
            len(absent),
            len(names),
            names[absent[0]],
            absent[0],
        )


def _check_pixels(images: Any, what: str) -> None:
    if not isinstance(images, Tensor):
        raise UsageError(f"{what} is a {type(images).__name__}; give a torch tensor, torch.from_numpy(…) of an array")
    if images.dtype != torch.uint8:
        raise UsageError(
            f"{what} is {images.dtype}; give uint8 in [0, 255]: images in [0, 1] times 255, deeper ones scaled"
        )
    if images.dim() == 3:
        raise UsageError(f"{what} is {list(images.shape)}; grey images need a channel too: images[:, None]")
    if images.dim() != 4:
        raise UsageError(f"{what} is {list(images.shape)}; give [N, C, H, W]")
    if images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        raise UsageError(f"{what} is {list(images.shape)}, channels last; give images.permute(0, 3, 1, 2)")


def _checked_labels(labels: Any, classes: int, what: str) -> Tensor:
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise UsageError(f"{what}: give a tensor [N] of whole numbers")
    labels = labels.to(torch.int64)
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise UsageError(
            f"{what} go from {int(labels.min())} to {int(labels.max())}, for {classes} class names; count from 0, "
            "without gaps"
        )
    return labels
