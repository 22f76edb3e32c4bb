"""Images from what is known half-way through a chain, where linear algebra alone leaves them open.

Deep in the model a batch's activations follow from the gradient; towards the image a layer may have more unknowns than
equations. There the image itself is sought, through the layers below: it must give the layer's known outputs and the
weight gradients of that layer and of those below, and among all such images the smoothest is taken. Each kind of
equation is whitened, so that a first-order method gets on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedleak.attacks.chain import Linear, Pointwise
from fedleak.attacks.inversion.optimizers import LBFGS
from fedleak.attacks.inversion.peeling.chain import Chain
from fedleak.attacks.inversion.peeling.estimate import Estimate, gradient_system

_OPPONENT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]], dtype=torch.float64)
_OPPONENT = _OPPONENT / _OPPONENT.norm(dim=1, keepdim=True) * torch.tensor([[1.0], [2.5], [2.5]], dtype=torch.float64)
"""Brightness and two colour differences; colour changes less than brightness, so its changes weigh more."""
_EDGE = 0.1
"""A change of brightness above this is an edge: it costs hardly more if it is larger."""
_TRUST = 0.03
"""Root-mean-square error of the activations that is good enough: noise that would ask for less is not followed."""


def search(
    chain: Chain,
    position: int,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    noise: Mapping[str, Tensor],
    outputs: Estimate,
    delta: Tensor,
    *,
    weights: Sequence[float] = (1e-2, 1e-3, 1e-4, 1e-5),
    steps: int = 80,
) -> Tensor:
    """Images that agree with the outputs of one layer and with all weight gradients up to it.

    Args:
        chain: the model.
        position: of the layer, a linear one, in `Chain.layers`.
        parameters, gradients: name -> ``[N, ...]``.
        noise: name -> ``[N]``, standard deviation of the gradient's entries.
        outputs: of the layer, less its bias, ``[N, B, O, P]``.
        delta: ∂L/∂outputs, ``[N, B, O, P]``.
        weights: of `roughness` against the equations, one after the other.
        steps: evaluations for each weight.

    Returns:
        ``[N, B, C, H, W]`` float64 in [0, 1].
    """
    problem = _Problem(chain, position, parameters, gradients, noise, outputs, delta)
    count, batch = delta.shape[:2]
    images = delta.new_full((count, batch * chain.image_shape[0] * problem.pixels), 0.5, dtype=torch.float32)
    optimizer = LBFGS(history_size=20, line_search="backtracking")
    for weight in weights:
        problem.whiten_below(images)
        state, x = optimizer.init(images), images
        least = torch.full((count,), torch.inf, device=delta.device)
        for step in range(steps):
            value, gradient = problem.evaluate(x, weight)
            better = value < least
            least, images = torch.where(better, value, least), torch.where(better[:, None], x, images)
            x = optimizer.step(state, x, value, gradient, torch.full_like(value, step / steps))
    return images.double().clamp(0, 1).view(count, batch, *chain.image_shape)


class _Problem:
    """The equations of N updates, in float32."""

    def __init__(
        self,
        chain: Chain,
        position: int,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        noise: Mapping[str, Tensor],
        outputs: Estimate,
        delta: Tensor,
    ) -> None:
        layer = chain.layers[position]
        assert isinstance(layer, Linear)
        self.layer, self.below, self.image_shape = layer, chain.layers[:position], chain.image_shape
        self.pixels, self.batch = chain.image_shape[1] * chain.image_shape[2], delta.shape[1]
        self.parameters = {name: value.float() for name, value in parameters.items()}
        self.outputs, self.delta = outputs.mean.float(), delta.float()
        self.wanted = {
            below.weight: below.kernel(gradients).float() for below in [*self.below, layer] if isinstance(below, Linear)
        }
        kernel = layer.kernel(parameters)
        basis = torch.eye(outputs.mean[0, 0].numel(), dtype=delta.dtype, device=delta.device)
        rows = layer.backward(basis.view(1, -1, *layer_outputs(layer)).expand(len(kernel), -1, -1, -1), parameters)
        spread = rows.flatten(2) @ rows.flatten(2).mT  # [N, O·P, O·P]
        variance = (outputs.std.flatten(2) / _TRUST) ** 2
        self.white_outputs = _whitening(spread[:, None] + torch.diag_embed(variance)).float()
        self.white = {layer.weight: self._whiten(layer, delta, noise[layer.weight])}

    def _whiten(self, layer: Linear, delta: Tensor, noise: Tensor | None) -> Tensor:
        """The whitening ``[N, O·K, O·K]`` of a layer's weight gradient."""
        tall = layer.tall(self.batch)
        system = gradient_system(tall, delta.transpose(1, 2).flatten(2).double())
        gram = system @ system.mT
        if noise is not None:
            gram.diagonal(dim1=1, dim2=2).add_((noise[:, None] / _TRUST) ** 2)
        return _whitening(gram).float()

    def whiten_below(self, images: Tensor) -> None:
        """Whiten the weight gradients of the layers below at the present images, where they depend on the images."""
        with torch.no_grad():
            deltas = self._walk(images)[1]
        for layer, delta in deltas:
            if layer is not self.layer:
                self.white[layer.weight] = self._whiten(layer, delta, None)

    def _walk(self, images: Tensor) -> tuple[Tensor, list[tuple[Linear, Tensor]], dict[str, Tensor]]:
        """The layer's outputs, each linear layer's ∂L/∂outputs, and its input."""
        value = images.view(len(images), self.batch, self.image_shape[0], self.pixels)
        values: list[Tensor] = [value]
        inputs: dict[str, Tensor] = {}
        for layer in self.below:
            if isinstance(layer, Linear):
                value = value.reshape(*value.shape[:2], layer.shape[0], layer.pixels)
                inputs[layer.weight] = value = _Patches.apply(value, layer)
                value = _from_patches(layer, value, self.parameters, bias=True)
            else:
                value = layer.value(value)
            values.append(value)
        value = value.reshape(*value.shape[:2], self.layer.shape[0], self.layer.pixels)
        inputs[self.layer.weight] = patches = _Patches.apply(value, self.layer)
        outputs = _from_patches(self.layer, patches, self.parameters, bias=False)
        deltas = [(self.layer, self.delta)]
        if any(isinstance(layer, Linear) for layer in self.below):
            delta = self.layer.backward(self.delta, self.parameters)
            for position in reversed(range(len(self.below))):
                layer = self.below[position]
                if isinstance(layer, Pointwise):
                    delta = delta.reshape(values[position + 1].shape) * layer.slope(values[position + 1])
                    continue
                delta = delta.reshape(*delta.shape[:2], *layer_outputs(layer))
                deltas.append((layer, delta))
                if any(isinstance(lower, Linear) for lower in self.below[:position]):
                    delta = layer.backward(delta, self.parameters)
        return outputs, deltas, inputs

    def evaluate(self, images: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """The objective ``[N]`` at images ``[N, D]`` and its gradient ``[N, D]``."""
        images = images.detach().requires_grad_()
        outputs, deltas, inputs = self._walk(images)
        gap = (self.white_outputs @ (outputs - self.outputs).flatten(2)[..., None])[..., 0]
        misfit = gap.square().sum((1, 2))
        for layer, delta in deltas:
            found = torch.einsum("nbop,nbckp->nock", delta, inputs[layer.weight])
            gap = (found - self.wanted[layer.weight]).transpose(1, 2).flatten(2) @ self.white[layer.weight].mT
            misfit = misfit + gap.square().sum((1, 2)) * (1.0 if layer is self.layer else 0.01)
        outside = (images - images.detach().clamp(0, 1)).square().sum(1)
        pictures = images.view(len(images), self.batch, *self.image_shape)
        value = (0.5 * misfit + 0.1 * outside) / weight + roughness(pictures)
        (gradient,) = torch.autograd.grad(value.sum(), images)
        return value.detach(), gradient


def roughness(images: Tensor) -> Tensor:
    """How little images ``[N, B, C, H, W]`` look like natural ones, ``[N]``.

    A heavy-tailed penalty (the negative logarithm of a Student density) on first and second differences, with the
    colours of a pixel taken together: most pixels continue their neighbours, some do not at all.
    """
    if images.shape[2] == 3:
        images = torch.einsum("dc,nbchw->nbdhw", _OPPONENT.to(images), images)
    down = images[..., 1:, :] - images[..., :-1, :]
    right = images[..., 1:] - images[..., :-1]
    curves = [down[..., 1:, :] - down[..., :-1, :], right[..., 1:] - right[..., :-1]]
    twist = (down[..., 1:] - down[..., :-1]) * 2**0.5
    total = images.new_zeros(len(images))
    for difference in (down, right, *curves, twist):
        square = difference.square().sum(2)
        total = total + _EDGE * torch.log1p(square / _EDGE**2).sum((1, 2, 3))
    return total


def layer_outputs(layer: Linear) -> tuple[int, int]:
    """(O, P) of a layer."""
    return layer.out_shape[0], layer.out_shape[1] * layer.out_shape[2]


def _from_patches(layer: Linear, patches: Tensor, parameters: Mapping[str, Tensor], *, bias: bool) -> Tensor:
    outputs = layer.kernel(parameters).flatten(2)[:, None] @ patches.flatten(-3, -2)
    return outputs + parameters[layer.bias][:, None, :, None] if bias and layer.bias is not None else outputs


def _whitening(spread: Tensor) -> Tensor:
    """L⁻¹ of spread = L Lᵀ, kept from blowing up on directions that hardly count."""
    size = spread.shape[-1]
    eye = torch.eye(size, dtype=spread.dtype, device=spread.device)
    mean = spread.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    factor = torch.linalg.cholesky_ex(spread + 1e-7 * mean * eye)[0]
    result: Tensor = torch.linalg.solve_triangular(factor, eye.expand_as(spread), upper=False)
    return result


class _Patches(torch.autograd.Function):
    """`Linear.patches` with a quick gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: Linear) -> Tensor:
        ctx.layer = layer
        return layer.patches(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = grads
        layer = ctx.layer
        inputs = gradient.new_zeros(*gradient.shape[:-2], layer.pixels + 1)
        return inputs.index_add_(-1, layer.taps.to(gradient.device).flatten(), gradient.flatten(-2))[..., :-1], None
