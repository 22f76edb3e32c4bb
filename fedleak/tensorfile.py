"""Tensors and a little JSON as safetensors bytes, and whole files of them, which know when they were altered."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedleak import files
from fedleak.errors import UsageError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SEAL = "0" * 64
"""Stands in a file where its own SHA-256 goes, while that is computed."""


def pack(tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> bytes:
    """`tensors`, in order, and a JSON `header` as the bytes of a safetensors file, sealed with a SHA-256 of their own.

    Raises:
        ValueError: a dtype that safetensors cannot hold.
    """
    head, parts = _pack(tensors, {"header": json.dumps({**(header or {}), "sealed": True}), "sha256": SEAL})
    digest = hashlib.sha256(head)
    for part in parts:
        digest.update(part)
    return b"".join([head.replace(SEAL.encode(), digest.hexdigest().encode(), 1), *parts])


def pack_unsealed(tensors: Mapping[str, Tensor]) -> bytes:
    """As `pack`, without header and seal: for what has its SHA-256 elsewhere."""
    head, parts = _pack(tensors, {})
    return b"".join([head, *parts])


def _pack(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> tuple[bytes, list[Any]]:
    """The head, and each tensor's bytes."""
    layout, parts = [], []
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"{name} is of {tensor.dtype}, which cannot be stored")
        parts.append(_raw(tensor))
        layout.append((name, NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes))
    return _head(tuple(layout), metadata), parts


def _raw(tensor: Tensor) -> Any:
    """A tensor's own memory, where that is what is to be written; every update passes here."""
    if not tensor.numel():
        return b""
    if tensor.device.type != "cpu" or tensor.requires_grad or not tensor.is_contiguous():
        tensor = tensor.detach().cpu().contiguous()
    return (tensor.reshape(-1).view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _head(layout: tuple[tuple[str, str, tuple[int, ...], int], ...], metadata: dict[str, str]) -> bytes:
    """The length and the JSON that a safetensors file begins with."""
    text = _described_layout(layout)
    if metadata:
        said = json.dumps(metadata, separators=(",", ":"))
        text = f'{{"__metadata__":{said}{"," if layout else ""}{text[1:]}'
    head = text.encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


@lru_cache(maxsize=64)
def _described_layout(layout: tuple[tuple[str, str, tuple[int, ...], int], ...]) -> str:
    """Names, types, shapes and places as JSON; the same for every update of a federation."""
    described: dict[str, Any] = {}
    end = 0
    for name, dtype, shape, size in layout:
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return json.dumps(described, separators=(",", ":"))


def unpack(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, header) of the bytes of a safetensors file.

    Raises:
        ValueError: they are none, or not as they were when they were sealed.
    """
    described, start = _described(data)
    metadata = described.pop("__metadata__", None) or {}
    seal = metadata.get("sha256")
    if seal is not None:
        blank = data[:start].replace(str(seal).encode(), SEAL.encode(), 1) + data[start:]
        if hashlib.sha256(blank).hexdigest() != seal:
            raise ValueError("altered since it was written")
    header = json.loads(metadata.get("header", "{}"))
    if header.pop("sealed", False) and seal is None:
        raise ValueError("its seal is lost")
    body = memoryview(data)[start:]
    tensors = {name: _tensor(body, entry) for name, entry in described.items()}
    return {name: tensors[name] for name in header.pop("names", tensors)}, header


def _described(data: bytes) -> tuple[dict[str, Any], int]:
    """What a file's head says, and where its data begin."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError("cut short")
    described = json.loads(data[8 : 8 + size])
    if not isinstance(described, dict):
        raise ValueError("its head is no mapping")
    return described, 8 + size


def _tensor(body: memoryview, entry: Mapping[str, Any]) -> Tensor:
    """One tensor; a copy, because views would be aligned as the head happens to be, and sums round accordingly."""
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if any(not isinstance(n, int) or n < 0 for n in (*shape, begin, end)) or end > len(body):
        raise ValueError("impossible sizes")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("sizes that disagree")
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(np.frombuffer(body[begin:end], np.uint8).copy()).view(dtype).reshape(shape)


def describe(head: bytes) -> tuple[int, dict[str, Any]]:
    """How long the safetensors bytes are that begin with `head`, and their header; raises ValueError."""
    described, start = _described(head)
    metadata = described.pop("__metadata__", None) or {}
    end = max((int(entry["data_offsets"][1]) for entry in described.values()), default=0)
    return start + end, json.loads(metadata.get("header", "{}"))


def save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> str:
    """Write `tensors`, in order, and a JSON `header` to `path` atomically; returns the file's SHA-256."""
    data = pack(tensors, header)
    files.write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def load(path: Path, *, sha256: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read (tensors, header) from `path`.

    Raises:
        UsageError: the file is missing, truncated, altered or not ours.
    """
    return parse(files.read_bytes(path), path, sha256=sha256)


def parse(data: bytes, path: Path, *, sha256: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, header) of what was read from `path`; raises `UsageError` where that is damaged."""
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise UsageError(f"{path}: truncated or altered since it was written; restore the file, or repeat the run")
    try:
        return unpack(data)
    except Exception as error:  # any damage at all
        raise UsageError(
            f"{path}: damaged, not a readable safetensors file ({type(error).__name__}); restore it, or repeat the run"
        ) from error
