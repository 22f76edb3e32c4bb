"""A data set's files: finding them under `root`, downloading them, and reading their formats."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedleak.errors import FedleakError, UsageError

DEFAULT_ROOT = "./data"


def folder_of(root: str | None) -> Path:
    """The folder that `data.root` names, `DEFAULT_ROOT` for None; it need not exist."""
    return Path(DEFAULT_ROOT if root is None else root).expanduser()


def shown(root: str | None) -> str:
    """`data.root` and its value for an error."""
    return f"data.root=null ({DEFAULT_ROOT})" if root is None else f"data.root={root}"


def find(
    name: str,
    root: str | None,
    download: bool,
    folder: str,
    files: Sequence[Sequence[str]],
    fetch: Callable[[Path], None],
    what: str | None = None,
) -> list[Path]:
    """Where a data set's files lie, downloaded first if they are missing and that is asked for.

    Args:
        name: of the data set.
        root: the value of `data.root`.
        download: whether to download what is missing.
        folder: below `root`, where the files lie.
        files: names below root/folder, each with its alternatives, the first the one to ask for.
        fetch: downloads everything into the root it is given.
        what: the files in words, where their names do not say it.

    Returns:
        A path for each of `files`.

    Raises:
        UsageError: files are missing.
        FedleakError: the download failed.
    """
    path = folder_of(root)
    by_hand = f"put {what or ', '.join(alternatives[0] for alternatives in files)} in {path / folder}"

    def search() -> list[Path] | None:
        hits = [next((p for alt in alts if (p := path / folder / alt).exists()), None) for alts in files]
        return None if None in hits else [hit for hit in hits if hit is not None]

    if (hits := search()) is not None:
        return hits
    if not download:
        state = (
            f"does not hold all {name} files"
            if path.is_dir()
            else "is a file, not a folder"
            if path.exists()
            else "does not exist"
        )
        raise UsageError(f"{shown(root)} {state}; {by_hand}, or set data.download=true")
    try:
        path.mkdir(parents=True, exist_ok=True)
        fetch(path)
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
        raise FedleakError(
            f"data.download=true failed for {name} ({type(error).__name__}: {reason}); try again, or {by_hand}"
        ) from error
    if (hits := search()) is None:
        raise FedleakError(f"data.download=true did not bring all {name} files; {by_hand}")
    return hits


@contextmanager
def reading(root: str | None, path: Path) -> Iterator[None]:
    """Turns whatever a broken file can raise into one `UsageError` that names it."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{shown(root)}: {path} cannot be read ({reason}); get that file again") from error


def pair(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Images ``[N, C, H, W]`` uint8 and labels ``[N]`` as tensors; ValueError if they are not that."""
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"images are {images.dtype} of shape {list(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images and labels of shape {list(labels.shape)}")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes in MNIST's IDX format, gzipped if the name ends in ``.gz``; ValueError if not."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError("not an IDX file of bytes")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def unpickle(path: Path) -> dict[str, Any]:
    """The dict of one of CIFAR's files; an error if it is anything else."""
    with path.open("rb") as file:
        content = _ArrayUnpickler(file, encoding="latin1").load()
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict")
    return content


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, lists, strings and nothing that could run code: a data set may come from anywhere."""

    ALLOWED = frozenset(
        [
            ("_codecs", "encode"),
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy.core.numeric", "_frombuffer"),
            ("numpy._core.numeric", "_frombuffer"),
        ]
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does")
        return super().find_class(module, name)
