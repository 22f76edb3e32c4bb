"""Derivatives through a client's own loop over local steps, for chains of layers: exact products, batched.

A step's gradient depends on its images and, through the steps before, on the weights. Both are swept through the
layers as a chain's derivatives are; the optimiser in between is differentiated as it stands.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.utils import _pytree as pytree

from fedleak.attacks.chain.base import Dense, Factored, Layer, Rows
from fedleak.attacks.jacobian.base import Jacobian, dense
from fedleak.attacks.jacobian.chain import ChainModel
from fedleak.attacks.problem import Target
from fedleak.training import SGD, LocalTraining, Tensors

_NUMBERS = 2**22
"""Numbers in the tangents that are swept at once."""
_EXACT = 8000
"""Unknowns up to which a preconditioner's derivatives are exact too: for more they would cost more than they save."""


@dataclass
class _Step:
    """One local step of all problems, as it was swept: S = P · b samples, each with its own problem's weights.

    Attributes:
        chosen: which of a problem's samples it trains on.
        layers: with the sweep's state.
        rows: the layers' weights, a row a sample.
        probabilities: ``[S, 1, classes]``.
        inputs, outputs: of the optimiser: leaves with a graph between them; empty where nobody asks where it leads.
        state, weights, gradient: the optimiser's, before the step.
    """

    chosen: slice
    layers: list[Layer]
    rows: Rows
    probabilities: Tensor
    inputs: list[Tensor]
    outputs: list[Tensor]
    state: Any
    weights: Tensors
    gradient: Tensors


class LoopModel:
    """P problems of one network, trained alike over several local steps; see `UpdateModel`.

    All of it is exact in float64. In float32, which only preconditions, `jacobian` of many unknowns leaves out that a
    step moves the gradients of later ones: then it costs no more than that of as many single steps.

    Args:
        layers: from `read_layers`; they are copied, since they keep state.
        targets: where each client started, and how it trained.
        device, dtype: where and in which precision.
    """

    def __init__(
        self, layers: Sequence[Layer], targets: Sequence[Target], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.layers, self.device, self.dtype = layers, device, dtype
        self.training: LocalTraining = targets[0].training
        assert self.training.optimizer is not None
        assert self.training.steps is not None
        names = [name for layer in layers for name in layer.parameters]
        self.start = {
            n: torch.stack([t.parameters[n] for t in targets]).detach().to(device, dtype) for n in dict.fromkeys(names)
        }
        self.shapes = {n: v.shape[1:] for n, v in self.start.items()}
        scale = self.training.scale or 1.0
        self.factor = (1.0 if self.training.payload == "gradient" else -1.0) / scale

    @torch.no_grad()
    def at(self, images: Tensor, labels: Tensor) -> None:
        """Stand at images ``[P, B, C, H, W]`` with label distributions ``[P, B, classes]``, step by step."""
        self.batch = images.shape[1]
        self.images, self.labels = images.to(self.dtype), labels.to(self.dtype)
        self.size = self.batch // (self.training.local_steps or 1)
        self.steps: list[_Step] = []
        optimizer, weights, total = self.training.optimizer, self.start, None
        assert optimizer is not None
        state = optimizer.init(weights)
        for number in range(self.training.steps or 1):
            step = self._sweep(number, state, weights)
            self.steps.append(step)
            if self.training.payload == "gradient":
                total = step.gradient if total is None else {n: v + step.gradient[n] for n, v in total.items()}
            if self.training.payload == "weights" or number + 1 < (self.training.steps or 1):
                state, weights = self._record(step)
        end = {n: v - self.start[n] for n, v in weights.items()} if total is None else total
        self.found = {n: self.factor * v.flatten(1) for n, v in end.items()}

    def _sweep(self, number: int, state: Any, weights: Tensors) -> _Step:
        """Forward and back of a step's samples."""
        first = number % (self.training.local_steps or 1) * self.size
        chosen = slice(first, first + self.size)
        layers = [copy.copy(layer) for layer in self.layers]
        each = {n: v.repeat_interleave(self.size, 0) if self.size > 1 else v for n, v in weights.items()}
        rows: Rows = {}
        for layer in layers:
            rows |= layer.weights([_Stacked(each)], lambda tensors: tensors[0])
        a = self.images[:, chosen].flatten(0, 1)[:, None]
        for layer in layers:
            a = layer.forward(rows, a)
        probabilities = a.softmax(2)
        delta: Tensor | None = (probabilities - self.labels[:, chosen].flatten(0, 1)[:, None]) / self.size
        for layer in reversed(layers):
            if delta is not None:
                delta = layer.backward(rows, delta)
        gradient: Tensors = {}
        for layer in layers:
            for name, value in layer.gradients().items():
                gradient[name] = self._summed(value).view(-1, *self.shapes[name])
        return _Step(chosen, layers, rows, probabilities, [], [], state, weights, gradient)

    def _summed(self, value: Tensor) -> Tensor:
        """Over a problem's samples, ``[S, ...]`` to ``[P, ...]``."""
        total: Tensor = value.unflatten(0, (-1, self.size)).sum(1) if self.size > 1 else value
        return total

    def _advance(self, state: Any, weights: Tensors, gradient: Tensors) -> tuple[Any, Tensors]:
        """What the client's optimiser makes of a gradient."""
        assert self.training.optimizer is not None
        if self.training.proximal:
            mu = self.training.proximal
            gradient = {n: g + mu * (weights[n] - self.start[n]) for n, g in gradient.items()}
        return self.training.optimizer.step(state, weights, gradient)

    def _record(self, step: _Step) -> tuple[Any, Tensors]:
        """The optimiser's step, with the graph that `pull` goes back along."""
        leaves, spec = pytree.tree_flatten((step.state, step.weights, step.gradient))
        with torch.enable_grad():
            inputs = [v.detach().requires_grad_() if isinstance(v, Tensor) else v for v in leaves]
            outputs, out_spec = pytree.tree_flatten(self._advance(*pytree.tree_unflatten(inputs, spec)))
        step.inputs = [v for v in inputs if isinstance(v, Tensor)]
        step.outputs = [v for v in outputs if isinstance(v, Tensor)]
        after: tuple[Any, Tensors] = pytree.tree_unflatten(
            [v.detach() if isinstance(v, Tensor) else v for v in outputs], out_spec
        )
        return after

    def gradients(self) -> Rows:
        """The updates, name -> ``[P, n]``."""
        return self.found

    @torch.no_grad()
    def push(self, directions: Tensor) -> Rows:
        """Derivatives of the updates, name -> ``[P, n]``, along directions ``[P, B, C, H, W]`` of the images."""
        return {n: v[:, 0] for n, v in self._along(directions.to(self.dtype)[:, :, None]).items()}

    def _along(self, directions: Tensor, first: int = 0) -> Rows:
        """The same along K directions at once, ``[P, B, K, C, H, W]``, zero before step `first`: ``[P, K, n]``."""
        count = directions.shape[2]
        still = {n: v.new_zeros(len(v), count, *v.shape[1:]) for n, v in self.start.items()}
        total, moved, state = still, still, None
        for step in self.steps[first:]:
            along = self._gradient_along(step, directions[:, step.chosen].flatten(0, 1), moved)
            if self.training.payload == "gradient":
                total = {n: v + along[n] for n, v in total.items()}
            if step.outputs:
                state = _still(step.state, count) if state is None else state
                state, moved = self._advance_along(step, state, moved, along)
        end = total if self.training.payload == "gradient" else moved
        return {n: self.factor * v.flatten(2) for n, v in end.items()}

    def _gradient_along(self, step: _Step, t: Tensor, moved: Tensors) -> Tensors:
        """The derivative ``[P, K, ...]`` of a step's gradient along `t` ``[S, K, ...]`` of its images and weights."""
        each = {n: v.repeat_interleave(self.size, 0) if self.size > 1 else v for n, v in moved.items()}
        for layer in step.layers:
            extra = layer.tangent_of_weights(each)
            t = layer.tangent(step.rows, t)
            t = t if extra is None else t + extra
        p = step.probabilities
        back: Tensor | None = p * (t - (t * p).sum(2, keepdim=True)) / self.size
        for layer in reversed(step.layers):
            if back is not None:
                extra = layer.tangent_back_of_weights(each)
                back = layer.tangent_back(step.rows, back)
                back = back + extra if back is not None and extra is not None else back
        found: Tensors = {}
        for layer in step.layers:
            for name, block in layer.columns().items():
                values = dense(block) if isinstance(block, Factored) else block.values
                found[name] = self._summed(values).unflatten(2, self.shapes[name])
        return found

    def _advance_along(self, step: _Step, state: Any, weights: Tensors, gradient: Tensors) -> tuple[Any, Tensors]:
        """The derivative of the optimiser's step along what moves, ``[P, K, ...]``."""
        if isinstance(self.training.optimizer, SGD) and not self.training.proximal:  # linear
            return self.training.optimizer.step(state, weights, gradient)
        leaves, spec = pytree.tree_flatten((step.state, step.weights, step.gradient))
        moves, _ = pytree.tree_flatten((state, weights, gradient))
        places = [i for i, v in enumerate(leaves) if isinstance(v, Tensor)]
        shape: list[Any] = []

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            filled = list(leaves)
            for place, value in zip(places, tensors, strict=True):
                filled[place] = value
            out, out_spec = pytree.tree_flatten(self._advance(*pytree.tree_unflatten(filled, spec)))
            shape[:] = [out, out_spec]
            return tuple(v for v in out if isinstance(v, Tensor))

        def one(*moves: Tensor) -> tuple[Tensor, ...]:
            along: tuple[Tensor, ...] = jvp(run, tuple(leaves[i] for i in places), moves)[1]
            return along

        along = vmap(one, in_dims=1, out_dims=1)(*(moves[i] for i in places))
        out, out_spec = shape
        rest = iter(along)
        after: tuple[Any, Tensors] = pytree.tree_unflatten(
            [next(rest) if isinstance(v, Tensor) else v for v in out], out_spec
        )
        return after

    @torch.no_grad()
    def pull(self, values: Rows) -> Tensor:
        """The adjoint of `push`: ``[P, B, C, H, W]`` of name -> ``[P, n]``."""
        given = {n: self.factor * values[n].to(self.dtype).view_as(v) for n, v in self.start.items()}
        found = torch.zeros_like(self.images)
        sums = self.training.payload == "gradient"
        later: list[Tensor] | None = None  # by the state and weights after the step
        for step in reversed(self.steps):
            by_gradient, before = self._back(step, later, given)
            if sums:
                by_gradient = {n: v + given[n] for n, v in by_gradient.items()} if by_gradient else given
            by_images, by_weights = self._pull_step(step, by_gradient)
            found[:, step.chosen] += by_images
            count = len(self.start)
            state, weights = before[:-count] if before else [], before[-count:] if before else []
            names = list(self.start)
            whole = [by_weights[n] + (weights[i] if weights else 0) for i, n in enumerate(names)]
            later = [*state, *whole]
        return found

    def _back(self, step: _Step, later: list[Tensor] | None, given: Tensors) -> tuple[Tensors, list[Tensor]]:
        """Through the optimiser: by the step's gradient, and by the state and weights before it."""
        if not step.outputs:
            return {}, []
        count = len(self.start)
        if later is None:  # the last step, whose weights are what is sent
            state = [torch.zeros_like(v) for v in step.outputs[:-count]]
            later = [*state, *(given[n] for n in self.start)]
        else:
            fill = len(step.outputs) - len(later)  # a state that the last step did not have
            later = [*(torch.zeros_like(v) for v in step.outputs[:fill]), *later]
        grads = torch.autograd.grad(
            step.outputs, step.inputs, later, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(self.start, grads[-count:], strict=True)), list(grads[:-count])

    def _pull_step(self, step: _Step, by_gradient: Tensors) -> tuple[Tensor, Tensors]:
        """∂⟨by_gradient, gradient⟩ by the step's images ``[P, b, C, H, W]`` and by its weights."""
        each = {n: v.flatten(1) for n, v in by_gradient.items()}
        if self.size > 1:
            each = {n: v.repeat_interleave(self.size, 0) for n, v in each.items()}
        by_delta: Tensor | None = None
        deltas = []
        for layer in step.layers:
            deltas.append(by_delta)
            layer.assign(each)
            by_delta = layer.forward_again(step.rows, by_delta)
        assert by_delta is not None
        by_delta = by_delta / self.size
        p = step.probabilities
        a = p * (by_delta - (p * by_delta).sum(2, keepdim=True))
        by_weights: Tensors = {}
        for layer, delta in zip(reversed(step.layers), reversed(deltas), strict=True):
            for name, value in layer.pull_weights(delta, a).items():
                by_weights[name] = self._summed(value).view(-1, *self.shapes[name])
            a = layer.backward_again(step.rows, a)
        return a[:, 0].unflatten(0, (-1, self.size)), by_weights

    def jacobian(self, basis: Tensor) -> Jacobian:
        """Derivatives by coordinates in `basis` ``[K, C, H, W]``, the same for every sample; it still stands there."""
        return Jacobian.join(list(self.jacobians(basis)))

    @torch.no_grad()
    def jacobians(self, basis: Tensor) -> Iterator[Jacobian]:
        """The same, one sample of every problem at a time, so that memory is bounded."""
        if self.dtype == torch.float64 or self.batch * len(basis) <= _EXACT:
            yield from self._exactly(basis.to(self.dtype))
            return
        leads = self._leads()
        for sample in range(self.batch):
            total: dict[str, Dense | Factored] = {}
            for number, step in enumerate(self.steps):
                if not step.chosen.start <= sample < step.chosen.stop:
                    continue
                starts = [_Stacked({n: v[p] for n, v in step.weights.items()}) for p in range(len(self.images))]
                one = ChainModel(self.layers, starts, device=self.device, dtype=self.dtype)
                one.at(self.images[:, sample : sample + 1], self.labels[:, sample : sample + 1])
                for name, block in one.jacobian(basis).blocks.items():
                    led = _times(block, leads[number][name] / self.size)
                    total[name] = led if name not in total else Dense(dense(total[name]) + dense(led))
            yield Jacobian(total)

    def _exactly(self, basis: Tensor) -> Iterator[Jacobian]:
        """By `push`, along some directions at once."""
        few = max(8, _NUMBERS // (self._widest() * len(self.images) * self.size))
        for sample in range(self.batch):
            parts: dict[str, list[Tensor]] = {n: [] for n in self.start}
            for some in basis.split(few):
                directions = basis.new_zeros(*self.images.shape[:2], len(some), *some.shape[1:])
                directions[:, sample] = some
                for name, value in self._along(directions, sample // self.size).items():
                    parts[name].append(value)
            yield Jacobian({n: Dense(torch.cat(values, 1)[:, None]) for n, values in parts.items()})

    def _widest(self) -> int:
        """Numbers of one tangent at its widest: patches of a convolution's input, or the weights."""
        found = [getattr(layer, "patches", None) for layer in self.steps[0].layers]
        patches: list[int] = [value.numel() // len(value) for value in found if isinstance(value, Tensor)]
        weights: int = sum(shape.numel() for shape in self.shapes.values())
        return max([weights, *patches])

    def _leads(self) -> list[dict[str, Tensor]]:
        """Of every step, how far each element of its gradient moves what is sent, were later gradients not to change:
        name -> ``[P, n]``, or ``[P, 1]`` where it is the same for all."""
        ones = {n: torch.ones_like(v) for n, v in self.start.items()}
        if self.training.payload == "gradient":
            return [{n: self.factor * v.flatten(1)[:, :1] for n, v in ones.items()} for _ in self.steps]
        found, later = [], None
        for step in reversed(self.steps):
            by_gradient, later = self._back(step, later, ones)
            each = {n: self.factor * v.flatten(1) for n, v in by_gradient.items()}
            same = self.training.shares is not None
            found.append({n: v[:, :1] if same else v for n, v in each.items()})
        return found[::-1]


@dataclass(frozen=True)
class _Stacked:
    """Weights in the place of an observation's."""

    parameters: Mapping[str, Tensor]

    @property
    def update(self) -> Mapping[str, Tensor]:
        """None."""
        return {}


def _times(block: Dense | Factored, factor: Tensor) -> Dense | Factored:
    """A block times a number, or a number for each element of the parameter."""
    if factor.shape[1] > 1:
        return Dense(dense(block) * factor[:, None, None])
    if isinstance(block, Dense):
        return Dense(block.values * factor[:, None, None])
    return Factored(
        block.delta * factor[:, None], block.inputs, block.delta_dot * factor[:, None, None], block.inputs_dot
    )


def _still(state: Any, count: int) -> Any:
    """An optimiser's state that moves in none of so many directions, ``[P, K, ...]``."""

    def zeros(value: Any) -> Any:
        return value.new_zeros(len(value), count, *value.shape[1:]) if isinstance(value, Tensor) else value

    return pytree.tree_map(zeros, state)
