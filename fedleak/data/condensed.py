"""A condensed data set in place of the one that it was made from."""

from __future__ import annotations

from dataclasses import replace

from fedleak.condensation.store import load_condensed
from fedleak.data.datasets import ImageData
from fedleak.errors import UsageError
from fedleak.instantiate import Part


def condensed(
    *, root: str | None = None, download: bool = False, image_size: int | None = None, limit: int | None = None
) -> ImageData:
    """What ``fedleak condense`` left in `root`, as the clients' images; the test images are those of the original data.

    `download`, `image_size` and `limit` are not used: the images are what they are.
    """
    found = load_condensed(root)
    if image_size is not None or limit is not None:
        key, value = ("image_size", image_size) if image_size is not None else ("limit", limit)
        raise UsageError(f"data.{key}={value}: condensed images are what they are; leave data.{key}=null")
    original: ImageData = Part("data", found.data).build(ImageData)
    pixels = (found.images * 255).round().byte()
    return replace(original, name="condensed", train_images=pixels, train_labels=found.labels)
