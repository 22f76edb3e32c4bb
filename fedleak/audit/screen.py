"""Looked at before an attack from Python: one update must stop no other, and no wrong word go unnoticed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge
from fedleak.attacks.labels.last_layer import find_last_layer
from fedleak.audit.optimiser import read_trace
from fedleak.capture import Observation
from fedleak.errors import UsageError


def usable(observation: Observation) -> Observation:
    """The observation in float32, whatever its numbers came in; one that holds nothing carries that as its error."""
    if observation.error is not None:
        return observation
    o = observation
    plain = replace(
        o,
        parameters=_float32(o.parameters),
        update=_float32(o.update),
        start_buffers=_float32(o.start_buffers),
        buffers=_float32(o.buffers),
    )
    weights = plain.training.payload == "weights"
    moved = (not torch.equal(v, plain.parameters[n]) if weights else bool(v.any()) for n, v in plain.update.items())
    return plain if any(moved) else replace(plain, error="empty: it holds no change at all")


def _float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def contradictions(observations: Sequence[Observation], knowledge: Knowledge) -> dict[tuple[int, int], str]:
    """(round, client) -> why its update is not what plain SGD leaves, where the clients are said to train so.

    A model that does not end in a linear layer tells nothing of this.
    """
    try:
        layer = find_last_layer(knowledge)
    except UsageError:
        return {}
    found = {}
    for o in observations:
        training = o.training
        plain = training.optimizer is None or training.optimizer.plain
        if o.error is not None or training.per_sample or not plain or layer.weight not in o.update:
            continue
        change = {n: v - o.parameters[n] if training.payload == "weights" else v for n, v in o.update.items()}
        if not any(bool(change[n].any()) for n in (layer.weight, layer.bias) if n):
            continue
        kind = read_trace(layer, dict(o.parameters), change, training.payload, training.steps or 1).kind
        if kind in WORDS:
            found[(o.round, o.client)] = WORDS[kind]
    return found


WORDS = {
    "adaptive": "steps are of one size, as Adam's: these are no clients of plain SGD; name their optimizer",
    "decay": "weight decay was seen; name the clients' optimizer, SGD(lr, weight_decay=…)",
    "change": "what came is a change of the weights and no new weights; add the old ones, or name the payload",
    "other": "the last layer's change is not what SGD on the cross-entropy leaves",
}
"""What a kind of `fedleak.audit.optimiser.Trace` means where plain SGD was stated."""
