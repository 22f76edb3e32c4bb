"""What a layer of a chain can do: sweeps over values, gradients, distances and tangents, all batched over problems."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fedleak.attacks.chain.products import Products
from fedleak.attacks.chain.undo import Linear, Pointwise

Rows = dict[str, Tensor]
"""Tensors with the problems as their first dimension (or 1 where all problems share them)."""
Stack = Callable[[list[Tensor]], Tensor]
"""Stacks one tensor a problem, in the device and precision of the computation."""


class Observed(Protocol):
    """What a layer reads of one problem: where the client started, and what it sent."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """name -> tensor."""

    @property
    def update(self) -> Mapping[str, Tensor]:
        """name -> tensor, a mean gradient."""


class Layer(ABC):
    """One link of a chain. The sweeps call its methods in order; it keeps in `self` what later ones need.

    A distance takes four sweeps: `forward`, `backward` (and `book`), `forward_again` (`weigh` first), `backward_again`.
    Derivatives of the update along directions take `forward`, `backward`, `tangent`, `tangent_back`, with B = 1.
    """

    parameters: tuple[str, ...] = ()
    in_shape: tuple[int, ...] = ()  # of one sample's input
    first = False  # nothing before it has parameters, so that sweeps back may end here

    @abstractmethod
    def forward(self, rows: Rows, a: Tensor) -> Tensor:
        """Outputs of inputs ``[P, B, ...]``."""

    @abstractmethod
    def backward(self, rows: Rows, delta: Tensor) -> Tensor | None:
        """∂loss/∂inputs of ∂loss/∂outputs; None where `first`."""

    @abstractmethod
    def forward_again(self, rows: Rows, by_delta: Tensor | None) -> Tensor | None:
        """∂objective/∂(∂loss/∂outputs) of ∂objective/∂(∂loss/∂inputs); None before the first layer with weights."""

    @abstractmethod
    def backward_again(self, rows: Rows, by_output: Tensor) -> Tensor:
        """∂objective/∂inputs of ∂objective/∂outputs."""

    @abstractmethod
    def tangent(self, rows: Rows, t: Tensor) -> Tensor:
        """Derivatives of the outputs ``[P, K, ...]`` along K directions, of the inputs' ``[P or 1, K, ...]``."""

    @abstractmethod
    def tangent_back(self, rows: Rows, t: Tensor) -> Tensor | None:
        """Derivatives of ∂loss/∂inputs ``[P, K, ...]`` of those of ∂loss/∂outputs; None where `first`."""

    def book(self, rows: Rows, products: Products) -> None:  # noqa: B027  a layer without parameters books nothing
        """Book how far the layer's own gradient is from the observed one; after `backward`."""

    def weigh(self, rows: Rows, products: Products) -> None:  # noqa: B027
        """Take ∂objective/∂gradient from what the objective said of what was booked; before `forward_again`."""

    def assign(self, values: Rows) -> None:  # noqa: B027
        """Take name -> ``[P, n]`` for ∂objective/∂gradient instead; before `forward_again`."""

    def gradients(self) -> Rows:
        """name -> ``[P, ...]``, the loss's gradient by the layer's parameters; after `backward`."""
        return {}

    def columns(self) -> dict[str, Dense | Factored]:
        """name -> derivatives of `gradients` along the K directions; after `tangent_back`."""
        return {}

    def tangent_of_weights(self, moved: Rows) -> Tensor | None:
        """Derivatives of the outputs ``[P, K, ...]`` along name -> ``[P, K, ...]`` of the weights; before `tangent`."""
        return None

    def tangent_back_of_weights(self, moved: Rows) -> Tensor | None:
        """Derivatives of ∂loss/∂inputs along those; None where `first`."""
        return None

    def pull_weights(self, by_delta: Tensor | None, by_output: Tensor) -> Rows:
        """∂objective/∂weights, name -> ``[P, ...]``, of what `forward_again` and `backward_again` are given."""
        return {}

    def undone(self) -> Linear | Pointwise | None:
        """What the layer is to one who undoes it; None where it only gives the elements another shape.

        Raises:
            ValueError: it cannot be undone.
        """
        raise ValueError(f"{type(self).__name__} cannot be undone")

    def load(self, targets: Sequence[Observed], stack: Stack) -> Rows:
        """What `book` needs of these problems, one row each."""
        return {}

    def weights(self, targets: Sequence[Observed], stack: Stack) -> Rows:
        """The layer's parameters, one row each, or a single row where all problems share them."""
        return {}


@dataclass(frozen=True)
class Dense:
    """Derivatives of one parameter's gradient: ``[P, K, n]``."""

    values: Tensor


@dataclass(frozen=True)
class Factored:
    """Derivatives of δ hᵀ, the gradient of a fully connected layer: δ̇ hᵀ + δ ḣᵀ, never formed.

    Attributes:
        delta: ``[P, O]``.
        inputs: ``[P, n]``.
        delta_dot: ``[P, K, O]``.
        inputs_dot: ``[P, K, n]``.
    """

    delta: Tensor
    inputs: Tensor
    delta_dot: Tensor
    inputs_dot: Tensor
