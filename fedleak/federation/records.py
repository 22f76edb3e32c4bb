"""Flower records to tensors and back, and the names both sides of the wire agree on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from torch import Tensor

ARRAYS = "arrays"
METRICS = "metrics"
CONFIG = "config"
CLIENT = "client"
PARTITION = "partition-id"
EXAMPLES = "num-examples"


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """An ArrayRecord of copies of `tensors`, in order."""
    return ArrayRecord({name: Array(value.detach().cpu().numpy().copy()) for name, value in tensors.items()})


def to_tensors(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Tensors (copies) of an ArrayRecord, in order."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}


def client_record(message: Message) -> ConfigRecord:
    """The ConfigRecord in which one of our clients says who it is; empty if there is none."""
    record = message.content.config_records.get(CLIENT) if message.has_content() else None
    return record if record is not None else ConfigRecord()
