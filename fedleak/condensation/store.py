"""Condensed images on disk: what `fedleak condense` leaves, and ``data=condensed`` reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedleak import tensorfile
from fedleak.condensation.condense import Progress
from fedleak.errors import UsageError

FILE = "condensed.safetensors"
"""Its name in a run directory."""


@dataclass(frozen=True)
class Condensed:
    """A condensed data set.

    Attributes:
        images: ``[N, C, H, W]`` in [0, 1].
        labels: ``[N]`` int64.
        class_names: a name for every class.
        data: the configuration node of the data set that was condensed.
    """

    images: Tensor
    labels: Tensor
    class_names: list[str]
    data: Mapping[str, Any]


def save_condensed(path: Path, condensed: Condensed) -> None:
    """Write it to `path`, pixels as bytes."""
    pixels = (condensed.images.clamp(0, 1) * 255).round().byte()
    header = {"class_names": condensed.class_names, "data": dict(condensed.data)}
    tensorfile.save(path, {"images": pixels, "labels": condensed.labels}, header)


def load_condensed(root: str | None, key: str = "data.root") -> Condensed:
    """Read what stands in the folder `root` of a ``fedleak condense`` run; `key` is what errors call it.

    Raises:
        UsageError: it is not there, or damaged.
    """
    path = Path(root or "").expanduser() / FILE
    if root is None or not path.is_file():
        raise UsageError(f"{key}={root}: holds no {FILE}; name the folder of a fedleak condense run")
    tensors, header = tensorfile.load(path)
    if not {"images", "labels"} <= tensors.keys() or not {"class_names", "data"} <= header.keys():
        raise UsageError(f"{key}={root}: {path.name} is no condensed data set; name that of a fedleak condense run")
    images = tensors["images"].float() / 255
    return Condensed(images, tensors["labels"].long(), list(header["class_names"]), header["data"])


def save_progress(path: Path, progress: Progress) -> None:
    """Write down how far images are, to the bit."""
    tensors = {"images": progress.images, "speed": progress.speed}
    tensorfile.save(path, tensors, {"networks": progress.networks})


def load_progress(path: Path) -> Progress | None:
    """How far images were, None where nothing was written down; raises `UsageError` where that is damaged."""
    if not path.exists():
        return None
    tensors, header = tensorfile.load(path)
    try:
        return Progress(header["networks"], tensors["images"], tensors["speed"])
    except KeyError as error:
        raise UsageError(f"{path}: holds no images that can be gone on with; remove it") from error
