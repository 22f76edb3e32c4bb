"""Every sample of a batch from the gradients of fully connected layers: row-space matching through hidden layers.

Each layer's gradient is G = Δᵀ H / B, of its inputs H (with a 1 for the bias) and the loss's derivatives Δ by its
outputs. If its rank is B, every sample's inputs lie in its row space, and every sample's derivatives in its column
space. So a sample's features, the inputs of the first layer, are R c for some c in ℝ^B, with a 1 where the bias is.
They and a label decide all that follows: its inputs of the next layers, and its derivatives on the way back. All of
these must lie in the spaces of their layers: hundreds of equations for B − 1 unknowns, for each sample alone and for
any label, so that labels may repeat and need not be known. Roots are found by Levenberg–Marquardt from mixtures of the
gradient's rows.

A root is a sample of the batch exactly if taking its share δ hᵀ / B off the gradient lowers the rank, which is so if
hᵀ G⁺ δ / B = 1 (Wedderburn 1934). The shares of the samples found are taken off; what is left is a smaller batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedleak.attacks.chain import Layer
from fedleak.attacks.chain.base import Observed
from fedleak.attacks.chain.elementwise import Elementwise
from fedleak.attacks.chain.fully_connected import FullyConnected
from fedleak.seeding import plain_generator

_RANK = 3e-3
"""The next singular value over a batch's smallest, up to which the batch's samples can be told apart."""
_ROOT = 1e-6
"""Square of what is left of the equations at a root."""
_LOWERS = 0.03
"""How far hᵀ G⁺ δ / B may be from 1."""
_SAME = 1e-3
"""Relative distance of two roots that are one."""
_SOUND = 1e-3
"""Relative gap of every gradient, of samples that are right."""
_STEPS, _STARTS, _PATIENCE = 40, 8, 4
_NUMBERS = 2**24
"""In the derivatives that are held at once."""
_PRODUCTS = 2e11
"""Multiplications of one round, at most, unless one start of each label takes more."""


@dataclass(frozen=True)
class Samples:
    """A batch, by label.

    Attributes:
        inputs: ``[B, n]`` float64, of the first layer.
        delta: ``[B, O]`` float64, the batch's mean loss's derivatives by the first layer's outputs.
        labels: ``[B]`` int64.
        error: the largest relative gap of a layer's gradient.
    """

    inputs: Tensor
    delta: Tensor
    labels: Tensor
    error: float


def separate(
    head: Sequence[Layer], target: Observed, batch: int, labels: Tensor | None = None, *, seed: int = 0
) -> Samples | None:
    """The samples behind the gradients of fully connected layers with elementwise functions between them.

    Args:
        head: at least two fully connected layers, all with biases, the last of which gives the logits.
        target: the update of one step on a batch.
        batch: samples, B.
        labels: ``[B]``, where they are known: fewer hypotheses.
        seed: decides the starts.

    Returns:
        None where the layers are others, or not every sample was found.
    """
    network = _Network.read(head, target)
    if network is None:
        return None
    classes = len(network.weights[-1])
    hypotheses = torch.arange(classes) if labels is None else labels.cpu().unique()
    gradients, found = network.gradients, list[tuple[Tensor, int]]()
    generator = plain_generator(seed)
    barren = 0
    while len(found) < batch and barren < _PATIENCE:
        spaces = _Spaces.of(gradients, batch - len(found))
        if spaces is None:
            return None
        roots = _roots(network, spaces, hypotheses, generator, batch)
        barren = 0 if roots else barren + 1
        for inputs, label in roots[: batch - len(found)]:
            shares = network.shares(inputs[None], torch.tensor([label]), batch)
            gradients = [g - share for g, share in zip(gradients, shares, strict=True)]
            found.append((inputs, label))
    if len(found) < batch:
        return None
    found.sort(key=lambda pair: pair[1])
    of = torch.tensor([label for _, label in found])
    inputs = _refined(network, torch.stack([inputs for inputs, _ in found]), of)
    shares = network.shares(inputs, of, batch)
    error = max(float((s - g).norm() / g.norm()) for s, g in zip(shares, network.gradients, strict=True))
    if not error < _SOUND:
        return None
    return Samples(inputs, network.sweep(inputs, F.one_hot(of, classes))[1][0] / batch, of, error)


@dataclass(frozen=True)
class _Network:
    """The layers in float64: weights and gradients ``[O, n + 1]`` with the biases, and the functions between."""

    weights: list[Tensor]
    functions: list[Elementwise]
    gradients: list[Tensor]

    @staticmethod
    def read(head: Sequence[Layer], target: Observed) -> _Network | None:
        linear, between = head[::2], head[1::2]
        weights, gradients, functions = list[Tensor](), list[Tensor](), list[Elementwise]()
        for layer in linear:
            if not isinstance(layer, FullyConnected) or layer.bias is None:
                return None
            for tensors, kept in ((target.parameters, weights), (target.update, gradients)):
                both = tensors[layer.weight], tensors[layer.bias][:, None]
                kept.append(torch.cat([v.detach().cpu().double() for v in both], 1))
        for function in between:
            if not isinstance(function, Elementwise):
                return None
            functions.append(function)
        sound = all(bool(g.isfinite().all()) for g in gradients)
        return _Network(weights, functions, gradients) if len(linear) == len(between) + 1 > 1 and sound else None

    def sweep(self, inputs: Tensor, labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Each layer's inputs with a 1, and the loss's derivatives by its outputs, of inputs ``[N, n]``."""
        hidden, delta, _, _ = self.along(F.pad(inputs, (0, 1), value=1.0), None, labels)
        return hidden, delta

    def along(
        self, first: Tensor, t: Tensor | None, labels: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """The same with their derivatives ``[N, K, ·]`` along directions `t` ``[N or 1, K, n + 1]`` of the inputs."""
        hidden, moved, slopes, bends = [first], [] if t is None else [t], list[Tensor](), list[Tensor]()
        for weight, function in zip(self.weights, self.functions, strict=False):
            z = hidden[-1] @ weight.T
            h = function.function(z)
            slope = function.slope(z, h)
            hidden.append(F.pad(h, (0, 1), value=1.0))
            slopes.append(slope)
            if t is not None:
                z_dot = moved[-1] @ weight.T
                moved.append(F.pad(z_dot * slope[:, None], (0, 1)))
                bend = None if function.curvature is None else function.curvature(z, h, slope)
                bends.append(z_dot.new_zeros(()) if bend is None else z_dot * bend[:, None])
        p = (hidden[-1] @ self.weights[-1].T).softmax(1)
        delta, turned = [p - labels], list[Tensor]()
        if t is not None:
            z_dot = moved[-1] @ self.weights[-1].T
            turned.append(p[:, None] * (z_dot - (z_dot * p[:, None]).sum(2, keepdim=True)))
        for place in reversed(range(len(self.functions))):
            weight = self.weights[place + 1][:, :-1]
            back = delta[0] @ weight
            if t is not None:
                turned.insert(0, turned[0] @ weight * slopes[place][:, None] + back[:, None] * bends[place])
            delta.insert(0, back * slopes[place])
        return hidden, delta, moved, turned

    def shares(self, inputs: Tensor, labels: Tensor, batch: int) -> list[Tensor]:
        """What samples with inputs ``[N, n]`` add to each layer's gradient."""
        hidden, delta = self.sweep(inputs, F.one_hot(labels, len(self.weights[-1])))
        return [d.T @ h / batch for d, h in zip(delta, hidden, strict=True)]


@dataclass(frozen=True)
class _Spaces:
    """Each layer's column space ``[O, B]`` and row space ``[n + 1, B]``; None where its rank is not B."""

    gradients: list[Tensor]
    columns: list[Tensor | None]
    rows: list[Tensor | None]

    @staticmethod
    def of(gradients: list[Tensor], batch: int) -> _Spaces | None:
        """None where the first layer's rank is not B: then its features cannot be told apart."""
        columns, rows = list[Tensor | None](), list[Tensor | None]()
        for gradient in gradients:
            left, values, right = torch.linalg.svd(gradient, full_matrices=False)
            sound = len(values) > batch and bool(values[batch] < _RANK * values[batch - 1])
            columns.append(left[:, :batch] if sound else None)
            rows.append(right[:batch].T if sound else None)
        return None if rows[0] is None else _Spaces(gradients, columns, rows)

    def equations(self, network: _Network, inputs: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is left outside the spaces ``[N, E]``, its derivatives ``[N, K, E]``, and the first layer's delta."""
        hidden, delta, moved, turned = network.along(inputs, t, labels)
        values, slopes = list[Tensor](), list[Tensor]()
        pairs = [*zip(delta, turned, self.columns, strict=True), *zip(hidden, moved, self.rows, strict=True)]
        for place, (value, slope, space) in enumerate(pairs):
            if space is None or place == len(delta):  # the inputs themselves lie in their rows' space
                continue
            size = value.norm(dim=1, keepdim=True).clamp(min=1e-30)
            values.append((value - value @ space @ space.T) / size)
            slopes.append((slope - slope @ space @ space.T) / size[:, None])
        return torch.cat(values, 1), torch.cat(slopes, 2), delta[0]


def _roots(
    network: _Network, spaces: _Spaces, hypotheses: Tensor, generator: torch.Generator, batch: int
) -> list[tuple[Tensor, int]]:
    """Samples that were found: their inputs ``[n]`` and labels."""
    rows, columns = spaces.rows[0], spaces.columns[0]
    assert rows is not None
    assert columns is not None
    size = rows.shape[1]
    work = len(hypotheses) * size * _STEPS * 4 * sum(weight.numel() for weight in network.weights)
    starts = max(1, min(_STARTS, int(_PRODUCTS / work)))
    c = _starts(spaces.gradients[0], rows, len(hypotheses) * starts, generator)
    labels = hypotheses.repeat_interleave(starts)
    equations = sum(space.shape[0] for space in (*spaces.columns, *spaces.rows) if space is not None)
    few = max(1, _NUMBERS // (size * equations))
    parts = [_matched(network, spaces, *some) for some in zip(c.split(few), labels.split(few), strict=True)]
    c, left, delta = (torch.cat(values) for values in zip(*parts, strict=True))
    core = columns.T @ spaces.gradients[0] @ rows
    one = ((delta / batch @ columns) * torch.linalg.solve(core.T, c.T).T).sum(1)
    inputs = (c @ rows.T)[:, :-1]
    chosen: list[int] = []
    for place in left.argsort(stable=True).tolist():
        good = float(left[place]) < _ROOT and abs(float(one[place]) - 1) < _LOWERS
        gaps = (inputs[chosen] - inputs[place]).norm(dim=1)
        if good and not bool((gaps < _SAME * inputs[place].norm()).any()):
            chosen.append(place)
    return [(inputs[place], int(labels[place])) for place in chosen]


def _matched(
    network: _Network, spaces: _Spaces, c: Tensor, labels: Tensor, steps: int = _STEPS
) -> tuple[Tensor, Tensor, Tensor]:
    """The end of every start ``[N, B]``, the square of what is left there, and the first layer's delta ``[N, O]``."""
    rows = spaces.rows[0]
    assert rows is not None
    hot = F.one_hot(labels, len(network.weights[-1])).double()
    # Steps stay where the last input is 1: they are orthogonal to R's last row.
    tangent = torch.linalg.svd(rows[-1:], full_matrices=True).Vh[1:]
    t = (tangent @ rows.T)[None]
    r, slopes, delta = spaces.equations(network, c @ rows.T, t, hot)
    value = r.square().sum(1)
    damping = torch.full_like(value, 1e-2)
    for _ in range(steps if len(tangent) else 0):
        on = ((value > 1e-14) & (damping < 1e6)).nonzero()[:, 0]
        if not len(on):
            break
        j = slopes[on]
        normal = j @ j.mT
        damped = normal + torch.diag_embed(damping[on, None] * normal.diagonal(dim1=1, dim2=2) + 1e-16)
        step = torch.linalg.solve_ex(damped, -(j @ r[on, :, None]))[0][..., 0]
        moved = c[on] + step @ tangent
        new_r, new_slopes, new_delta = spaces.equations(network, moved @ rows.T, t, hot[on])
        new_value = new_r.square().sum(1)
        better = new_value < value[on]
        kept = on[better]
        c[kept], r[kept], slopes[kept], delta[kept], value[kept] = (
            v[better] for v in (moved, new_r, new_slopes, new_delta, new_value)
        )
        damping[on] = torch.where(better, damping[on] / 3, damping[on] * 4).clamp(min=1e-12)
    return c, value, delta


def _starts(gradient: Tensor, rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Points ``[count, B]`` of the row space with a last input of 1.

    A gradient's row over its last number is a weighted mean of the samples' inputs; starts are mixtures of their
    differences about the middle one.
    """
    last = gradient[:, -1]
    some = last.abs() > 0.05 * last.abs().amax()
    means = (gradient[some] / last[some, None]) @ rows
    centre = means.median(0).values
    apart = means - centre
    wide = 4.5 * apart.abs().median(0).values
    mix = torch.randn(count, len(means), generator=generator, dtype=means.dtype) / len(means) ** 0.5
    c = centre + mix @ apart.clamp(-wide, wide)
    scaled: Tensor = c / (c @ rows[-1])[:, None]
    return scaled


def _refined(network: _Network, inputs: Tensor, labels: Tensor) -> Tensor:
    """Inputs ``[B, n]`` of all samples, refined on the whole gradient: taking off shares has added up errors."""
    spaces = _Spaces.of(network.gradients, len(inputs))
    if spaces is None or spaces.rows[0] is None:
        return inputs
    rows = spaces.rows[0]
    c = F.pad(inputs, (0, 1), value=1.0) @ rows
    c = c / (c @ rows[-1])[:, None]
    return (_matched(network, spaces, c, labels, steps=8)[0] @ rows.T)[:, :-1]
