"""What the attacker holds about one update (`Observation`) and the folder it keeps them in (`CaptureStore`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Payload = Literal["gradient", "weights"]


@dataclass(frozen=True)
class Observation:
    """One client's update as the server saw it, and what the threat model lets the attacker know about it.

    Attributes:
        round: the server round, from 1.
        client: the client's partition id (or its position in a federation that does not tell).
        parameters: name -> tensor, the trainable parameters the client started from.
        update: name -> tensor, what the client sent back, same names and shapes.
        payload: ``gradient``: `update` is the sum over local steps of the gradients of the mean loss;
            ``weights``: `update` holds the client's new parameters.
        batch_size: samples per local step, None if withheld.
        lr: the client's learning rate, None if withheld.
        local_steps: the client's local steps, None if withheld.
        start_buffers: name -> tensor, the model's buffers as the server sent them (the server always knows them).
        buffers: name -> tensor, the buffers the client returned; empty if withheld or there are none.
        labels: ``[B * local_steps]`` int64 sorted ascending, only if the threat model grants them.
        per_sample: `update` has a leading sample dimension ``[B, ...]`` (iDLG's per-sample scenario).
        error: why the update is unusable (a client error, NaN, wrong shapes), None if it is fine.
    """

    round: int
    client: int
    parameters: Mapping[str, Tensor]
    update: Mapping[str, Tensor]
    payload: Payload = "gradient"
    batch_size: int | None = None
    lr: float | None = None
    local_steps: int | None = None
    start_buffers: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    per_sample: bool = False
    error: str | None = None

    @property
    def sign(self) -> int:
        """+1 if `update` points along the gradient, -1 if new - old weights, which point against it."""
        return 1 if self.payload == "gradient" else -1

    @property
    def scale(self) -> float | None:
        """What the mean gradient was multiplied with to give the change that was sent; None if withheld."""
        if self.payload == "weights" and self.lr is None:
            return None
        steps = self.local_steps or 1
        return float(steps if self.payload == "gradient" else steps * (self.lr or 0.0))

    def gradient(self) -> dict[str, Tensor]:
        """The mean gradient over the client's local steps, in the convention of `torch.autograd`.

        Sign and scale are undone. Where the learning rate is withheld, the result is right up to a positive factor.
        """
        scale = self.scale or 1.0
        if self.payload == "gradient":
            return {name: value / scale for name, value in self.update.items()}
        return {name: (self.parameters[name] - value) / scale for name, value in self.update.items()}
