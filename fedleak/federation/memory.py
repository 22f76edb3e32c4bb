"""What a strategy remembers from round to round, as data: nothing in it is imported or called when it is read."""

from __future__ import annotations

import functools
import inspect
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from torch import Tensor

from fedleak.errors import UsageError
from fedleak.tensorfile import NAMES

RECORDS: Mapping[Any, str] = {ConfigRecord: "config", MetricRecord: "metrics"}
CONTAINERS: Mapping[Any, str] = {list: "list", tuple: "tuple", set: "set"}


@dataclass(frozen=True)
class Memory:
    """What an object remembers: plain JSON, and the tensors that it names by numbers."""

    said: Any
    tensors: Mapping[str, Tensor]


class Unstorable(Exception):
    """Something that cannot be written as data; the message says where it stands."""


def remember(thing: Any, name: str = "strategy") -> Memory:
    """What `thing` and the objects inside it hold in their attributes: numbers, arrays, generators, containers of them.

    Functions, classes, modules and loggers are left out: they are there again when `thing` is built again.

    Raises:
        Unstorable: something else is among them, a lock say.
    """
    teller = _Teller()
    return Memory(teller.say(thing, name), teller.tensors)


class _Teller:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.seen: set[int] = set()

    def say(self, value: Any, where: str) -> Any:
        """JSON: plain values as they are, all else as ``[kind, …]``."""
        if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, np.generic)):
            return value
        if isinstance(value, np.ndarray | np.generic):
            return ["array", self._keep(np.array(value), where), isinstance(value, np.generic)]
        if isinstance(value, Tensor):
            return ["tensor", self._keep(value, where)]
        if isinstance(value, ArrayRecord):
            return ["arrays", {name: self._keep(array.numpy().copy(), where) for name, array in value.items()}]
        if type(value) in RECORDS:
            return [RECORDS[type(value)], self.say(dict(value), where)]
        if type(value) in CONTAINERS:
            return [CONTAINERS[type(value)], [self.say(item, f"{where}[{n}]") for n, item in enumerate(value)]]
        if isinstance(value, dict):
            return ["dict", [[self.say(k, where), self.say(v, f"{where}[{k!r}]")] for k, v in value.items()]]
        return self._object(value, where)

    def _object(self, value: Any, where: str) -> Any:
        if isinstance(value, random.Random):
            return ["random", self.say(value.getstate(), where)]
        if isinstance(value, np.random.Generator):
            return ["numpy", self.say(value.bit_generator.state, where)]
        if isinstance(value, torch.Generator):
            return ["torch", self._keep(value.get_state(), where)]
        built = isinstance(value, type | ModuleType | functools.partial | logging.Logger) or inspect.isroutine(value)
        if built or id(value) in self.seen:
            return ["same"]
        if not hasattr(value, "__dict__"):
            raise Unstorable(f"{where} is a {type(value).__name__}")
        self.seen.add(id(value))
        return ["object", {key: self.say(item, f"{where}.{key}") for key, item in vars(value).items()}]

    def _keep(self, value: Any, where: str) -> str:
        try:
            tensor = value.detach().clone().cpu() if isinstance(value, Tensor) else torch.from_numpy(value)
        except TypeError as error:
            raise Unstorable(f"{where} is an array of {value.dtype}") from error
        if tensor.dtype not in NAMES:
            raise Unstorable(f"{where} is of {tensor.dtype}")
        self.tensors[str(len(self.tensors))] = tensor
        return str(len(self.tensors) - 1)


def recall(thing: Any, memory: Memory) -> None:
    """Have `thing`, built anew, remember what `memory` says.

    Raises:
        UsageError: it is not built as the one was.
    """
    try:
        _Reader(memory.tensors).read(memory.said, thing)
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UsageError(
            f"what {type(thing).__name__} remembered when it was interrupted does not fit it ({error}); repeat the run"
        ) from error


class _Reader:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, said: Any, now: Any) -> Any:
        """The value that was `said`; `now` is what stands in its place."""
        if not isinstance(said, list):
            return said
        kind, *rest = said
        if kind == "array":
            array = self.tensors[rest[0]].numpy().copy()
            return array[()] if rest[1] else array
        if kind == "tensor":
            return self.tensors[rest[0]].clone()
        if kind == "arrays":
            return ArrayRecord({name: Array(self.tensors[key].numpy().copy()) for name, key in rest[0].items()})
        for record, words in RECORDS.items():
            if kind == words:
                return record(self.read(rest[0], None))
        for container, words in CONTAINERS.items():
            if kind == words:
                there = list(now) if isinstance(now, container) and len(now) == len(rest[0]) else [None] * len(rest[0])
                return container(self.read(item, one) for item, one in zip(rest[0], there, strict=True))
        if kind == "dict":
            pairs = [(self.read(key, None), item) for key, item in rest[0]]
            return {key: self.read(item, now.get(key) if isinstance(now, dict) else None) for key, item in pairs}
        self._tell(now, kind, *rest)
        return now

    def _tell(self, now: Any, kind: str, said: Any = None) -> None:
        """Generators and objects are there already, and are told what they were."""
        if kind == "random":
            now.setstate(self.read(said, None))
        elif kind == "numpy":
            now.bit_generator.state = self.read(said, None)
        elif kind == "torch":
            now.set_state(self.tensors[said])
        elif kind == "object":
            for key, item in said.items():
                vars(now)[key] = self.read(item, vars(now).get(key))
        elif kind == "unstorable":
            raise ValueError(f"{said}, which cannot be stored")
        elif kind != "same":
            raise ValueError(f"nobody knows {kind}")
