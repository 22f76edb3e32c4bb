"""What a client says in a reply beside its arrays: read with suspicion, because anything may stand there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from fedleak.errors import FedleakError
from fedleak.federation.records import ARRAYS, EXAMPLES, records_of
from fedleak.training import SGD, LocalTraining

MOST = 10**7
"""Examples, or steps, or clients, beyond which a claim is not believed."""


class Claim(FedleakError):
    """What a client says cannot be."""


def number(says: Mapping[str, Any], key: str, *, least: float, most: float = MOST) -> float | None:
    """A number that is said, None where it is not; raises `Claim` for what is no number, or an absurd one."""
    if key not in says:
        return None
    value = says[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Claim(f"{key} is no number")
    if not least <= value <= most:
        raise Claim(f"{key}={value} cannot be")
    return float(value)


def whole(says: Mapping[str, Any], key: str, *, least: int) -> int | None:
    """As `number`, of a whole one."""
    value = number(says, key, least=least)
    if value is not None and value != int(value):
        raise Claim(f"{key}={value} is no whole number")
    return None if value is None else int(value)


def examples(reply: Message) -> float | None:
    """How many examples a reply counts, in whichever record it says so."""
    for record in records_of(reply.content, MetricRecord).values():
        if EXAMPLES in record:
            return number(record, EXAMPLES, least=1)
    return None


def told(training: LocalTraining, says: Mapping[str, Any]) -> LocalTraining:
    """`training` with what a server or a client says of learning rate, steps and proximal term.

    Raises:
        FedleakError: that cannot be.
    """
    steps, mu = whole(says, "local-steps", least=1), number(says, "proximal-mu", least=0)
    if steps is not None and steps != training.local_steps:
        training = replace(training, local_steps=steps)
    if "lr" in says and (isinstance(says["lr"], bool) or says["lr"] != training.lr):
        optimizer = SGD(says["lr"]) if training.optimizer is None else replace(training.optimizer, lr=says["lr"])
        training = replace(training, optimizer=optimizer)
    return training if mu in (None, training.proximal) else replace(training, proximal=mu)


def class_labels(says: Mapping[str, Any], classes: int | None) -> list[int] | None:
    """The labels that a client names, where it does; raises `Claim` for what can be none."""
    labels = says.get("labels")
    if labels is None:
        return None
    whole_ones = isinstance(labels, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in labels)
    if not whole_ones or not labels or min(labels) < 0 or max(labels) >= (MOST if classes is None else classes):
        raise Claim("labels are no classes")
    return sorted(labels)


def arrays_of(reply: Message, key: str, sent: Mapping[str, Tensor]) -> ArrayRecord:
    """The record that holds the update: some clients send more, such as control variates.

    Args:
        reply: its array records in any order.
        key: what the message's own was called.
        sent: the model that was sent, parameters and buffers.

    Raises:
        Claim: there is none.
    """
    records = records_of(reply.content, ArrayRecord)
    if not records:
        raise Claim("no arrays")
    for name in (key, ARRAYS):
        if name in records:
            return records[name]
    fitting = [record for record in records.values() if len(record) == len(sent)]
    return fitting[0] if fitting else next(iter(records.values()))
