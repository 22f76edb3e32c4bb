"""How a client trains: what it sends, over how many steps, with which optimiser; and the only loop over those steps.

Everything here is out of place and made of plain tensor operations: an attacker may differentiate through `unroll`,
vectorise it, or run it under `torch.func`.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedleak.errors import UsageError
from fedleak.threat import ThreatModel

Payload = Literal["gradient", "weights"]
Tensors = dict[str, Tensor]
"""Tensors by the names of the model's parameters."""
Given = Mapping[str, Tensor]
"""The same, not to be modified."""
State = dict[str, Any]
"""What an optimiser remembers between two steps."""


@dataclass(frozen=True)
class ClientOptimizer(ABC):
    """How a client turns a gradient into new weights; agrees with its namesake in `torch.optim` step by step.

    Subclass it as a frozen dataclass in a file of your own: its fields are what a capture keeps of it.

    Attributes:
        lr: learning rate.

    Raises:
        UsageError: `lr` is not a finite number above 0.
    """

    lr: float

    def __post_init__(self) -> None:
        if isinstance(self.lr, bool) or not isinstance(self.lr, int | float) or not 0 < self.lr < math.inf:
            raise UsageError(f"lr={self.lr} is no learning rate; give a finite number above 0")

    @property
    def plain(self) -> bool:
        """Whether a step is the gradient times the learning rate."""
        return False

    def shares(self, steps: int) -> tuple[float, ...] | None:
        """How far the gradient of each of so many steps moves the weights in the end, in units of the learning rate.

        None where new weights are no sum of gradients.
        """
        return None

    def init(self, weights: Given) -> State:
        """What there is to remember before the first step."""
        return {}

    @abstractmethod
    def step(self, state: State, weights: Given, gradient: Given) -> tuple[State, Tensors]:
        """One step: the state after it and the new weights. Modifies nothing, and can be differentiated."""


@dataclass(frozen=True)
class SGD(ClientOptimizer):
    """Stochastic gradient descent, as `torch.optim.SGD` without dampening.

    Args:
        momentum: 0 is plain.
        nesterov: look ahead along the momentum.
        weight_decay: that times the weights is added to the gradient.
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    @property
    def plain(self) -> bool:
        return self.momentum == 0 and self.weight_decay == 0

    def shares(self, steps: int) -> tuple[float, ...] | None:
        if self.weight_decay:
            return None
        moved = [sum(self.momentum**k for k in range(left)) for left in range(steps, 0, -1)]
        return tuple(1 + self.momentum * each if self.nesterov else each for each in moved)

    def init(self, weights: Given) -> State:
        return {"momentum": {n: torch.zeros_like(w) for n, w in weights.items()}} if self.momentum else {}

    def step(self, state: State, weights: Given, gradient: Given) -> tuple[State, Tensors]:
        if self.weight_decay:
            gradient = {name: g + self.weight_decay * weights[name] for name, g in gradient.items()}
        if self.momentum:
            moving = {name: self.momentum * state["momentum"][name] + g for name, g in gradient.items()}
            state = {"momentum": moving}
            gradient = {n: g + self.momentum * moving[n] for n, g in gradient.items()} if self.nesterov else moving
        return state, {name: weights[name] - self.lr * g for name, g in gradient.items()}


@dataclass(frozen=True)
class Adam(ClientOptimizer):
    """Adam (Kingma & Ba 2015), as `torch.optim.Adam` without amsgrad.

    Args:
        betas: decay of the means of the gradient and of its square.
        eps: added to the root of the latter.
        weight_decay: that times the weights is added to the gradient or, if `decoupled`, that times `lr` is taken off
            them (Loshchilov & Hutter 2019).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", tuple(self.betas))  # a list, where it comes from a file

    def init(self, weights: Given) -> State:
        zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
        return {"steps": 0, "mean": zeros, "square": zeros}

    def step(self, state: State, weights: Given, gradient: Given) -> tuple[State, Tensors]:
        steps, (first, second) = state["steps"] + 1, self.betas
        if self.weight_decay and self.decoupled:
            weights = {name: value * (1 - self.lr * self.weight_decay) for name, value in weights.items()}
        elif self.weight_decay:
            gradient = {name: g + self.weight_decay * weights[name] for name, g in gradient.items()}
        mean = {name: first * state["mean"][name] + (1 - first) * g for name, g in gradient.items()}
        square = {name: second * state["square"][name] + (1 - second) * g * g for name, g in gradient.items()}
        size, unbiased = self.lr / (1 - first**steps), (1 - second**steps) ** 0.5
        new = {n: weights[n] - size * m / (_root(square[n]) / unbiased + self.eps) for n, m in mean.items()}
        return {"steps": steps, "mean": mean, "square": square}, new


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay, as `torch.optim.AdamW`."""

    weight_decay: float = 0.01
    decoupled: bool = True


def _root(square: Tensor) -> Tensor:
    """The square root, whose derivative at zero is zero and not infinite."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains between receiving a model and answering. None stands for what is withheld.

    Attributes:
        payload: ``gradient``: it sends the sum over its steps of the gradients of the mean loss;
            ``weights``: its new weights.
        batch_size: samples per local step.
        local_steps: batches of one epoch.
        epochs: how often it goes over those batches.
        optimizer: what makes steps of gradients.
        training_mode: whether the model runs in train mode (matters for BatchNorm and dropout).
        per_sample: it sends the gradient of every sample, ``[B, ...]`` (one step, payload ``gradient``).
        proximal: that times the distance from the received weights is added to the gradient of each step (FedProx, Li
            2020); the server asks for it, and so knows it.
    """

    payload: Payload = "gradient"
    batch_size: int | None = None
    local_steps: int | None = None
    epochs: int | None = 1
    optimizer: ClientOptimizer | None = None
    training_mode: bool = True
    per_sample: bool = False
    proximal: float = 0.0

    @property
    def lr(self) -> float | None:
        """The learning rate."""
        return None if self.optimizer is None else self.optimizer.lr

    @property
    def steps(self) -> int | None:
        """Local steps, all epochs together."""
        return None if self.local_steps is None or self.epochs is None else self.local_steps * self.epochs

    @property
    def single(self) -> bool:
        """Whether there is one local step, and that is known."""
        return self.steps == 1

    @property
    def samples(self) -> int | None:
        """Samples behind an update, each counted once however many epochs there are."""
        return None if self.local_steps is None or self.batch_size is None else self.local_steps * self.batch_size

    @property
    def shares(self) -> tuple[float, ...] | None:
        """The weight of each step's gradient in what is sent; None where that is withheld, or no sum of gradients."""
        if self.steps is None or self.payload == "gradient":
            return None if self.steps is None else (1.0,) * self.steps
        if self.optimizer is None or (self.proximal != 0 and not self.single):
            return None
        return self.optimizer.shares(self.steps)

    @property
    def sign(self) -> int:
        """+1 if what is sent points along the gradient, -1 if it is new weights, whose change points against it."""
        return 1 if self.payload == "gradient" else -1

    @property
    def scale(self) -> float | None:
        """What the mean gradient was multiplied with to give the change that was sent.

        None where that is withheld, or where new weights are no sum of gradients.
        """
        shares = self.shares
        if shares is None:
            return None
        return sum(shares) if self.payload == "gradient" else sum(shares) * self.optimizer.lr  # type: ignore[union-attr]

    def mean_gradient(self, start: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> Tensors:
        """The mean gradient over the local steps, in the convention of `torch.autograd`, of what was sent.

        Under momentum it is a weighted mean, see `shares`. Sign and scale are undone. What of the scale is withheld is
        left in the result as a positive factor: the number of steps, or the learning rate. Where new weights are no sum
        of gradients, it is minus their change.

        Args:
            start, sent: the weights that training started from, and the update.
        """
        scale = self.scale
        if self.payload == "gradient":
            return {name: value / (scale or 1.0) for name, value in sent.items()}
        if scale is None and self.optimizer is not None and self.steps is None:
            scale = self.optimizer.lr
        return {name: (start[name] - value) / (scale or 1.0) for name, value in sent.items()}

    def batch(self, values: Tensor, step: int) -> Tensor:
        """The ``[B, ...]`` of `values` ``[T · B, ...]`` that step `step` trains on; an epoch begins again at the first.

        Raises:
            ValueError: the T batches of an epoch are not equally large.
        """
        count = self.local_steps or 1
        if len(values) % count:
            raise ValueError(f"{len(values)} samples are no {count} equal batches")
        size = len(values) // count
        return values[step % count * size : (step % count + 1) * size]

    def seen_by(self, threat: ThreatModel) -> LocalTraining:
        """What an attacker who is granted `threat` knows of it."""
        known = self if threat.batch_size else replace(self, batch_size=None)
        return known if threat.hyperparameters else replace(known, local_steps=None, epochs=None, optimizer=None)


def unroll(
    gradient_at: Callable[[int, Tensors], Tensors], start: Mapping[str, Tensor], training: LocalTraining
) -> Tensors:
    """What a client sends after its local steps: the one loop over them that there is.

    Args:
        gradient_at: step, weights -> the gradient there of that step's loss. Steps count from 0 through all epochs:
            see `LocalTraining.batch` for the data of each. Whatever else a step does, such as moving BatchNorm's
            statistics or differentiating, is this function's own affair.
        start: name -> tensor, the weights that training starts from.
        training: how; all of it that matters must be known.

    Returns:
        name -> tensor: the sum of the gradients, or the new weights, as `training.payload` says.

    Raises:
        UsageError: the number of steps or the optimiser is withheld.
    """
    weights = dict(start)
    if training.steps is None:
        raise UsageError("the number of local steps is withheld; grant it with threat.hyperparameters=true")
    if training.steps < 1:
        raise UsageError(f"a client of {training.steps} local steps does not train; let it take at least 1")
    optimizer, total, state = training.optimizer, Tensors(), None
    for step in range(training.steps):
        gradient = gradient_at(step, weights)
        if training.payload == "gradient":
            total = {name: total[name] + g for name, g in gradient.items()} if total else dict(gradient)
            if step == training.steps - 1:  # nobody asks where the last step leads
                return total
        if optimizer is None:
            raise UsageError("the client's optimiser is withheld; grant it with threat.hyperparameters=true")
        if training.proximal:
            pull = training.proximal
            gradient = {name: g + pull * (weights[name] - start[name]) for name, g in gradient.items()}
        state = optimizer.init(weights) if state is None else state
        state, weights = optimizer.step(state, weights, gradient)
    return weights


def known_optimizer(target: str) -> type[ClientOptimizer] | None:
    """An optimiser's class, if it is imported already: a capture from someone else must not have anything imported."""
    module, _, name = target.rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    return kind if isinstance(kind, type) and issubclass(kind, ClientOptimizer) else None


def optimizer_node(optimizer: ClientOptimizer) -> dict[str, Any]:
    """An optimiser as a node to instantiate: its class and its fields."""
    kind = type(optimizer)
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **asdict(optimizer)}
