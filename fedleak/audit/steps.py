"""How many steps of how many samples: what was said of it, put together, and whether it can be true."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Steps:
    """What follows from what is known; None is unknown.

    Attributes:
        batch_size, local_steps, epochs: as in `fedleak.training.LocalTraining`.
        contradiction: why not all of it can be true.
        assumed: what was taken for granted.
    """

    batch_size: int | None
    local_steps: int | None
    epochs: int | None
    contradiction: str | None = None
    assumed: str | None = None


def reconcile(
    *, examples: int | None, batch_size: int | None, steps: int | None, epochs: int | None, counted: int | None = None
) -> Steps:
    """Put together what is known about a client's steps.

    Args:
        examples: how many the client says that it trained on.
        batch_size: of a step.
        steps: optimiser steps, all epochs together.
        epochs: how often it goes over its data.
        counted: steps by a BatchNorm's `num_batches_tracked`, which cannot err.
    """
    if counted is not None and steps is not None and counted != steps:
        why = f"{steps} steps were stated, and BatchNorm counted {counted}"
        return Steps(batch_size, None, epochs, contradiction=why)
    steps = steps if counted is None else counted
    if batch_size is not None and examples is not None:
        return _both(examples, min(batch_size, examples), steps, epochs)
    assumed = None
    if epochs is None:
        epochs, assumed = 1, "one epoch"
    if steps is None:
        # Without either, one step is a guess; it is the one that explains the least.
        steps, assumed = epochs, "one step an epoch"
    if steps % epochs:
        return Steps(batch_size, None, epochs, contradiction=f"{steps} steps are no {epochs} epochs")
    local = steps // epochs
    if batch_size is None and examples is not None:
        batch_size = math.ceil(examples / local)
    return Steps(batch_size, local, epochs, assumed=assumed)


def _both(examples: int, batch_size: int, steps: int | None, epochs: int | None) -> Steps:
    """Where the client's examples and the size of a batch are both known."""
    whole, last = divmod(examples, batch_size)
    ways = [whole + bool(last)] + ([whole] if last and whole else [])  # a last batch that is smaller, or left out
    assumed = f"batches of {batch_size}, and one of {last}, count as equal" if last else None
    if steps is None:
        said = f"{epochs} epochs" if epochs is not None else "one epoch"
        if epochs is None:
            assumed = said if assumed is None else f"{said}; {assumed}"
        return Steps(batch_size, ways[0], epochs or 1, assumed=assumed)
    for local in ways:
        if steps % local == 0 and epochs in (None, steps // local):
            return Steps(batch_size, local, steps // local, assumed=assumed)
    over = "" if epochs is None else f" in {epochs} epochs"
    why = f"{examples} examples are no {steps} steps of {batch_size}{over}"
    return Steps(batch_size, None, epochs, contradiction=why)
