"""Tensors and a little JSON in one safetensors file, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedleak.errors import UsageError

if TYPE_CHECKING:  # a tap writes its files without torch
    from torch import Tensor


def save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> str:
    """Write `tensors`, in order, and a JSON `header` to `path` atomically; returns the file's SHA-256."""
    from safetensors.torch import save as to_bytes  # lazily: a bare attack machine may lack safetensors

    data = to_bytes(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
        metadata={"header": json.dumps({"names": list(tensors), **(header or {})})},
    )
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def load(path: Path, *, sha256: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read (tensors, header) from `path`.

    Raises:
        UsageError: the file is missing, truncated, altered (where `sha256` is given) or not ours.
    """
    from safetensors.torch import load as from_bytes

    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); restore the file") from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise UsageError(f"{path}: truncated or altered since it was written; restore the file, or repeat the run")
    try:
        # Copies, because views would be aligned as the file's header happens to be, and sums round accordingly.
        tensors = {name: value.clone() for name, value in from_bytes(data).items()}
        size = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + size]).get("__metadata__", {}).get("header", "{}"))
        tensors = {name: tensors[name] for name in header.pop("names", tensors)}
    except Exception as error:
        raise UsageError(f"{path}: damaged, not a readable safetensors file; restore it, or repeat the run") from error
    return tensors, header


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` beside `path` and move it into place, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    os.replace(partial, path)
