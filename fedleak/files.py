"""Whole files: written or not there at all. Needs nothing but Python."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedleak.errors import FedleakError, UsageError


def read_bytes(path: Path, offset: int = 0, size: int | None = None) -> bytes:
    """A file, or `size` bytes of it from `offset`; raises `UsageError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(-1 if size is None else size)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); restore the file") from error


def digest(path: Path) -> str:
    """The SHA-256 of a file; raises `UsageError` where it cannot be read."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` beside `path` and move it into place, so that a reader never sees half a file.

    Raises:
        FedleakError: the disk is full, or the folder cannot be written to; nothing is left there then.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        _remove(partial)
        raise FedleakError(
            f"{path}: cannot be written ({error.strerror}); make room, or name another folder"
        ) from error
    except BaseException:
        _remove(partial)
        raise


def sweep(folder: Path) -> None:
    """Remove what `write_atomically` left in a folder, and in those inside it, when it was killed."""
    for path in folder.rglob(".*"):
        if re.fullmatch(r"\..+\.\d+", path.name) and path.is_file():
            _remove(path)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Nobody else works in a folder meanwhile; however a process ends, it lets go of it.

    Raises:
        UsageError: somebody does.
    """
    try:
        import fcntl
    except ImportError:  # no such locks here
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{folder}: another fedleak is at work there; let it end, or end it") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(held)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
