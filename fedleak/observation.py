"""What the attacker holds about one update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedleak.training import LocalTraining, Tensors


@dataclass(frozen=True)
class Observation:
    """One client's update as the server saw it, and what the threat model lets the attacker know about it.

    Attributes:
        round: the server round, from 1.
        client: the client's partition id (or its position in a federation that does not tell).
        parameters: name -> tensor, the trainable parameters the client started from.
        update: name -> tensor, what the client sent back, same names and shapes, with a leading ``[B]`` where the
            training is `per_sample`; what it is, `training.payload` says. Empty where only models are seen.
        training: how the client trained, as far as it is known.
        start_buffers: name -> tensor, the model's buffers as the server sent them (the server always knows them).
        buffers: name -> tensor, the buffers the client returned; empty if withheld or there are none.
        labels: ``[B * local_steps]`` int64 sorted ascending, only if the threat model grants them.
        clients: of a sum of several clients' updates, whose they are, `client` first; empty for one client's own.
        error: why the update is unusable (a client error, NaN, wrong shapes), None if it is fine.
    """

    round: int
    client: int
    parameters: Mapping[str, Tensor]
    update: Mapping[str, Tensor]
    training: LocalTraining = field(default_factory=LocalTraining)
    start_buffers: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    clients: tuple[int, ...] = ()
    error: str | None = None

    @property
    def sign(self) -> int:
        """See `LocalTraining.sign`."""
        return self.training.sign

    @property
    def scale(self) -> float | None:
        """See `LocalTraining.scale`."""
        return self.training.scale

    def gradient(self) -> Tensors:
        """The mean gradient over the client's local steps, see `LocalTraining.mean_gradient`."""
        return self.training.mean_gradient(self.parameters, self.update)


def find_fault(
    update: Mapping[str, Tensor], parameters: Mapping[str, Tensor], *, per_sample: bool = False
) -> str | None:
    """Why `update` is none of `parameters`: a name missing, another shape or kind of number, a value not finite."""
    missing = sorted(set(parameters) - set(update))
    if missing:
        return f"missing tensor {missing[0]}"
    for name, value in update.items():
        if name not in parameters:
            return f"unknown tensor {name}"
        shape = value.shape[1:] if per_sample else value.shape
        if shape != parameters[name].shape:
            return f"wrong shape: {name} is {list(shape)}, expected {list(parameters[name].shape)}"
        if not _fits(value.dtype, parameters[name].dtype):
            return f"wrong dtype: {name} is {value.dtype}, expected {parameters[name].dtype}"
        # A sum that is finite has only finite terms, and is had at half the price.
        if not math.isfinite(value.sum()) and not torch.isfinite(value).all():
            return f"not finite: {name}"
    return None


def _fits(dtype: torch.dtype, sent: torch.dtype) -> bool:
    """Whether an answer in `dtype` is one to what was `sent`: a float may come back narrower, and never wider."""
    narrower = dtype.is_floating_point and sent.is_floating_point and dtype.itemsize <= sent.itemsize
    return dtype == sent or narrower


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of named tensors are equal to the bit."""
    return a is b or (a.keys() == b.keys() and all(v is b[k] or torch.equal(v, b[k]) for k, v in a.items()))
