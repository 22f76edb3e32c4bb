"""Flower records to tensors and back, and the names both sides of the wire agree on."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

ARRAYS = "arrays"
METRICS = "metrics"
CONFIG = "config"
CLIENT = "client"
PARTITION = "partition-id"
EXAMPLES = "num-examples"

R = TypeVar("R", ArrayRecord, MetricRecord, ConfigRecord)


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """An ArrayRecord of copies of `tensors`, in order."""
    return ArrayRecord({name: Array(value.detach().cpu().numpy().copy()) for name, value in tensors.items()})


def to_tensors(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Tensors (copies) of an ArrayRecord, in order."""
    return {name: _tensor(array) for name, array in arrays.items()}


def _tensor(array: Array) -> Tensor:
    """One array, read as `Array.numpy` does, which parses its head as Python each time and takes far longer."""
    data = array.data
    if array.stype == "numpy.ndarray" and data[:8] == b"\x93NUMPY\x01\x00":
        begin = 10 + int.from_bytes(data[8:10], "little")
        dtype, shape = _head(data[8:begin])
        if dtype is not None and len(data) - begin == math.prod(shape) * dtype.itemsize:
            return torch.from_numpy(np.frombuffer(data, dtype, offset=begin).reshape(shape).copy())
    return torch.from_numpy(array.numpy().copy())


@lru_cache(maxsize=1024)
def _head(head: bytes) -> tuple[np.dtype[Any] | None, tuple[int, ...]]:
    """What the head of a NumPy file says, None for a dtype where it is not plain numbers in C's order."""
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(head))
    except Exception:  # whatever is wrong, NumPy says it
        return None, ()
    return (None if fortran or dtype.hasobject or dtype.itemsize == 0 else dtype), shape


def records_of(content: RecordDict, kind: type[R]) -> dict[str, R]:
    """The records of one kind, as the content's own properties give them at ten times the price."""
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def client_record(message: Message) -> ConfigRecord:
    """The ConfigRecord in which one of our clients says who it is; empty if there is none."""
    record = message.content.get(CLIENT) if message.has_content() else None
    return record if isinstance(record, ConfigRecord) else ConfigRecord()
