"""The distance between updates for feed-forward chains, several times faster than vectorised differentiation.

For a chain of layers the gradient of the loss, its distance to the observed one, and the derivative of that distance
are four sweeps over the layers, written out here as batched matrix products:

1. forward: activations;
2. backward: δ = ∂loss/∂outputs of every layer, hence the dummy gradients and their distance to the observed ones;
3. forward again: ∂distance/∂δ, from the first layer to the last;
4. backward again: ∂distance/∂activations, down to the images.

The gradient of a fully connected layer, Σ_i δ_i a_iᵀ, is never formed when the observed one has the rank of a batch.

Operands are padded where the choice of a CPU kernel would depend on the alignment or the length of the whole batch, so
that an evaluation gives a problem the same bits whatever stands beside it.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedleak.attacks.inversion.gradients import Distance, Rows, Victim
from fedleak.attacks.inversion.objectives import Objective


class Products:
    """Collects the inner products of every parameter tensor, and then says how the objective depends on them.

    Attributes:
        dd, dt, tt: name -> ``[P]``, ‖G − T‖², ⟨G − T, T⟩ and ‖T‖².
        by_d, by_t: name -> ``[P]``: ∂objective/∂G = by_d · (G − T) + by_t · T.
    """

    def __init__(self) -> None:
        self.dd: Rows = {}
        self.dt: Rows = {}
        self.tt: Rows = {}
        self.by_d: Rows = {}
        self.by_t: Rows = {}

    def add(self, name: str, gap: Tensor, target: Tensor) -> None:
        """Book an explicit difference G − T, both ``[P, ...]``."""
        gap, target = gap.flatten(1), target.flatten(1)
        self.dd[name] = gap.square().sum(1)
        self.dt[name] = (gap * target).sum(1)
        self.tt[name] = target.square().sum(1)

    def judge(self, objective: Objective, names: Sequence[str]) -> Tensor:
        """The objective ``[P]``, and its derivatives into `by_d` and `by_t`."""
        dd, dt, tt = (torch.stack([table[name] for name in names], 1) for table in (self.dd, self.dt, self.tt))
        with torch.enable_grad():
            dd, dt = dd.requires_grad_(), dt.requires_grad_()
            value = objective(dd, dt, tt)
            by_dd, by_dt = torch.autograd.grad(value.sum(), (dd, dt), allow_unused=True, materialize_grads=True)
        for column, name in enumerate(names):
            self.by_d[name] = 2 * by_dd[:, column]
            self.by_t[name] = by_dt[:, column]
        self.blind = not by_dt.any()  # the objective does not look at ⟨G − T, T⟩, as L2 does not
        return value.detach()

    def pull(self, name: str, gap: Tensor, target: Tensor) -> Tensor:
        """∂objective/∂G of an explicit difference."""
        shape = (-1,) + (1,) * (gap.dim() - 1)
        pulled = self.by_d[name].view(shape) * gap
        return pulled if self.blind else pulled + self.by_t[name].view(shape) * target


class Layer(ABC):
    """One link of the chain. The four sweeps call its methods in order; it keeps in `self` what later ones need."""

    parameters: tuple[str, ...] = ()
    first = False  # nothing before it has parameters, so that the second sweep may end here

    @abstractmethod
    def forward(self, rows: Rows, a: Tensor) -> Tensor:
        """Outputs of inputs ``[P, B, ...]``."""

    @abstractmethod
    def backward(self, rows: Rows, delta: Tensor, products: Products) -> Tensor | None:
        """∂loss/∂inputs of ∂loss/∂outputs; books the layer's own gradient."""

    @abstractmethod
    def forward_again(self, rows: Rows, by_delta: Tensor | None, products: Products) -> Tensor | None:
        """∂objective/∂(∂loss/∂outputs) of ∂objective/∂(∂loss/∂inputs); None before the first layer with weights."""

    @abstractmethod
    def backward_again(self, rows: Rows, by_output: Tensor, products: Products) -> Tensor:
        """∂objective/∂inputs of ∂objective/∂outputs."""

    def load(self, victims: Sequence[Victim], stack: Callable[[list[Tensor]], Tensor]) -> Rows:
        """What the layer needs of these victims, one row each."""
        return {}

    def weights(self, victims: Sequence[Victim], stack: Callable[[list[Tensor]], Tensor]) -> Rows:
        """The layer's parameters, one row each, or a single row where all problems share them."""
        return {}


class Convolution(Layer):
    """A plain two-dimensional convolution, as a product with the patches of its input."""

    def __init__(self, name: str, module: nn.Conv2d) -> None:
        self.name = name
        self.weight, self.bias = f"{name}.weight", f"{name}.bias" if module.bias is not None else None
        self.parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        self.kernel, self.stride = module.kernel_size, module.stride
        self.padding, self.dilation = (int(module.padding[0]), int(module.padding[1])), module.dilation
        self.channels = module.out_channels

    def weights(self, victims: Sequence[Victim], stack: Callable[[list[Tensor]], Tensor]) -> Rows:
        """Kernels as ``[P, O, C·kh·kw]``, biases ``[P, O]``."""
        rows = {self.weight: stack([v.parameters[self.weight] for v in victims]).flatten(2)}
        if self.bias is not None:
            rows[self.bias] = stack([v.parameters[self.bias] for v in victims])
        return rows

    def load(self, victims: Sequence[Victim], stack: Callable[[list[Tensor]], Tensor]) -> Rows:
        """Observed gradients, shaped like the weights."""
        rows = {f"target:{self.weight}": stack([v.gradient[self.weight] for v in victims]).flatten(2)}
        if self.bias is not None:
            rows[f"target:{self.bias}"] = stack([v.gradient[self.bias] for v in victims])
        return rows

    def _patches(self, a: Tensor) -> Tensor:
        """``[P·B, C·kh·kw, H'·W']`` of ``[P·B, C, H, W]``: one strided copy."""
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        ph, pw = self.padding
        a = F.pad(a, (pw, pw, ph, ph))
        n, c, h, w = a.shape
        self.size = (h - dh * (kh - 1) - 1) // sh + 1, (w - dw * (kw - 1) - 1) // sw + 1
        s = a.stride()
        view = a.as_strided((n, c, kh, kw, *self.size), (s[0], s[1], s[2] * dh, s[3] * dw, s[2] * sh, s[3] * sw))
        return view.reshape(n, c * kh * kw, -1)

    def _unpatch(self, patches: Tensor) -> Tensor:
        """The adjoint of `_patches`, ``[P·B, C, H, W]``."""
        return F.fold(patches, self.input_size, self.kernel, self.dilation, self.padding, self.stride)

    def _each(self, weight: Tensor) -> Tensor:
        """``[P or 1, O, K]`` as ``[P·B, O, K]``."""
        p, b = self.batch
        return weight[:, None].expand(p, b, -1, -1).reshape(p * b, *weight.shape[1:])

    def forward(self, rows: Rows, a: Tensor) -> Tensor:
        """``[P, B, O, H', W']``."""
        self.batch, self.input_size = a.shape[:2], a.shape[3:]
        self.w = self._each(rows[self.weight])
        self.patches = self._patches(a.flatten(0, 1))
        z = (self.w @ self.patches).unflatten(0, self.batch)
        if self.bias is not None:
            z = z + rows[self.bias][:, None, :, None]
        return z.unflatten(3, self.size)

    def backward(self, rows: Rows, delta: Tensor, products: Products) -> Tensor | None:
        """``[P, B, C, H, W]``."""
        self.delta = delta = delta.flatten(0, 1).flatten(2)
        gradient = delta @ self.patches.mT
        gradient = gradient.unflatten(0, self.batch).sum(1) if self.batch[1] > 1 else gradient
        self.gap = gradient - rows[f"target:{self.weight}"]
        products.add(self.weight, self.gap, rows[f"target:{self.weight}"])
        if self.bias is not None:
            self.bias_gap = delta.sum(2).unflatten(0, self.batch).sum(1) - rows[f"target:{self.bias}"]
            products.add(self.bias, self.bias_gap, rows[f"target:{self.bias}"])
        return None if self.first else self._unpatch(self.w.mT @ delta).unflatten(0, self.batch)

    def forward_again(self, rows: Rows, by_delta: Tensor | None, products: Products) -> Tensor | None:
        """``[P, B, O, H', W']``."""
        self.pulled = self._each(products.pull(self.weight, self.gap, rows[f"target:{self.weight}"]))
        result = self.pulled @ self.patches
        if by_delta is not None:
            result.baddbmm_(self.w, self._patches(by_delta.flatten(0, 1)))
        result = result.unflatten(0, self.batch)
        if self.bias is not None:
            result = result + products.pull(self.bias, self.bias_gap, rows[f"target:{self.bias}"])[:, None, :, None]
        return result.unflatten(3, self.size)

    def backward_again(self, rows: Rows, by_output: Tensor, products: Products) -> Tensor:
        """``[P, B, C, H, W]``."""
        weights = torch.cat([self.pulled, self.w], 1)
        outputs = torch.cat([self.delta, by_output.flatten(0, 1).flatten(2)], 1)
        return self._unpatch(weights.mT @ outputs).unflatten(0, self.batch)


class FullyConnected(Layer):
    """A linear layer on vectors.

    An observed gradient T of the rank of a batch is kept as M Qᵀ with Q ``[n, r]`` orthonormal. With inputs a split
    into c = a Q and the rest a⊥, the gap is G − T = (δᵀ c − M) Qᵀ + δᵀ a⊥: two orthogonal parts, each small when the
    updates agree, so that its square ‖δᵀ c − M‖² + ⟨δδᵀ, a⊥a⊥ᵀ⟩ keeps its precision (‖G‖² − 2⟨G, T⟩ + ‖T‖² does not).
    Otherwise the gradient is formed.
    """

    def __init__(self, name: str, module: nn.Linear) -> None:
        self.name = name
        self.weight, self.bias = f"{name}.weight", f"{name}.bias" if module.bias is not None else None
        self.parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        self.shape = (module.out_features, module.in_features)
        self.rank: int | None = None

    def weights(self, victims: Sequence[Victim], stack: Callable[[list[Tensor]], Tensor]) -> Rows:
        """Weights ``[P, n_out, n_in]``, their transposes (a row vector times a matrix is what is fast), biases."""
        weight = stack([v.parameters[self.weight] for v in victims])
        rows = {self.weight: _padded(weight), f"{self.weight}:transposed": _padded(weight.mT)}
        if self.bias is not None:
            rows[self.bias] = stack([v.parameters[self.bias] for v in victims])
        return rows

    def load(self, victims: Sequence[Victim], stack: Callable[[list[Tensor]], Tensor]) -> Rows:
        """Observed gradients, whole or in factors."""
        target = stack([v.gradient[self.weight] for v in victims])
        if self.rank is None:
            rows = {f"target:{self.weight}": target}
        else:
            q, m = factors(target, self.rank)
            rows = {f"q:{self.weight}": _padded(q), f"qt:{self.weight}": q.mT.contiguous(), f"m:{self.weight}": m}
        if self.bias is not None:
            rows[f"target:{self.bias}"] = stack([v.gradient[self.bias] for v in victims])
        return rows

    def forward(self, rows: Rows, a: Tensor) -> Tensor:
        """``[P, B, n_out]``."""
        self.a = a
        z = _times(a, rows[f"{self.weight}:transposed"], self.shape[0])
        return z if self.bias is None else z + rows[self.bias][:, None]

    def backward(self, rows: Rows, delta: Tensor, products: Products) -> Tensor | None:
        """``[P, B, n_in]``."""
        self.delta = delta
        if self.rank is None:
            target = rows[f"target:{self.weight}"]
            self.gap = delta.mT @ self.a - target
            products.add(self.weight, self.gap, target)
        else:
            q, m = rows[f"q:{self.weight}"], rows[f"m:{self.weight}"]
            self.c = _times(self.a, q, self.rank)
            self.outside = self.a - self.c @ rows[f"qt:{self.weight}"]
            self.gap = delta.mT @ self.c - m
            self.gram_a = self.outside @ self.outside.mT
            self.gram_delta = delta @ delta.mT
            products.add(self.weight, self.gap, m)
            products.dd[self.weight] = products.dd[self.weight] + (self.gram_a * self.gram_delta).flatten(1).sum(1)
        if self.bias is not None:
            self.bias_gap = delta.sum(1) - rows[f"target:{self.bias}"]
            products.add(self.bias, self.bias_gap, rows[f"target:{self.bias}"])
        return None if self.first else _times(delta, rows[self.weight], self.shape[1])

    def forward_again(self, rows: Rows, by_delta: Tensor | None, products: Products) -> Tensor | None:
        """``[P, B, n_out]``."""
        if self.rank is None:
            self.pulled = products.pull(self.weight, self.gap, rows[f"target:{self.weight}"])
            result = self.a @ self.pulled.mT
        else:
            self.pulled = products.pull(self.weight, self.gap, rows[f"m:{self.weight}"])
            self.by_d = products.by_d[self.weight][:, None, None]
            result = self.c @ self.pulled.mT + self.by_d * (self.gram_a @ self.delta)
        if by_delta is not None:
            result = result + _times(by_delta, rows[f"{self.weight}:transposed"], self.shape[0])
        if self.bias is not None:
            result = result + products.pull(self.bias, self.bias_gap, rows[f"target:{self.bias}"])[:, None]
        return result

    def backward_again(self, rows: Rows, by_output: Tensor, products: Products) -> Tensor:
        """``[P, B, n_in]``."""
        result = _times(by_output, rows[self.weight], self.shape[1])
        if self.rank is None:
            return result + self.delta @ self.pulled
        inside = (self.delta @ self.pulled) @ rows[f"qt:{self.weight}"]
        return result + inside + self.by_d * (self.gram_delta @ self.outside)


class Elementwise(Layer):
    """An activation, given by its first and second derivative as functions of input and output."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        slope: Callable[[Tensor, Tensor], Tensor],
        curvature: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    ) -> None:
        self.function = function
        self.slope = slope
        self.curvature = curvature  # of (input, output, slope); None for piecewise linear functions

    def forward(self, rows: Rows, a: Tensor) -> Tensor:
        """Same shape."""
        self.z, self.h = a, self.function(a)
        self.d = self.slope(self.z, self.h)
        return self.h

    def backward(self, rows: Rows, delta: Tensor, products: Products) -> Tensor | None:
        """Same shape."""
        if self.first:
            return None
        self.delta = delta
        return delta * self.d

    def forward_again(self, rows: Rows, by_delta: Tensor | None, products: Products) -> Tensor | None:
        """Same shape."""
        self.by_delta = by_delta
        return None if by_delta is None else by_delta * self.d

    def backward_again(self, rows: Rows, by_output: Tensor, products: Products) -> Tensor:
        """Same shape."""
        result = by_output * self.d
        if self.by_delta is None or self.curvature is None:
            return result
        return result.addcmul_(self.by_delta * self.delta, self.curvature(self.z, self.h, self.d))


class Rearrangement(Layer):
    """A linear function without parameters (flatten, pooling) and its transpose."""

    def __init__(self, function: Callable[[Tensor], Tensor], transpose: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function
        self.transpose = transpose  # of (inputs of the function, what comes back)

    def forward(self, rows: Rows, a: Tensor) -> Tensor:
        """What the function makes of each image."""
        self.a = a
        return self._each(self.function, a)

    def backward(self, rows: Rows, delta: Tensor, products: Products) -> Tensor | None:
        """Shaped like the inputs."""
        return None if self.first else self._back(delta)

    def forward_again(self, rows: Rows, by_delta: Tensor | None, products: Products) -> Tensor | None:
        """Shaped like the outputs."""
        return None if by_delta is None else self._each(self.function, by_delta)

    def backward_again(self, rows: Rows, by_output: Tensor, products: Products) -> Tensor:
        """Shaped like the inputs."""
        return self._back(by_output)

    def _back(self, outputs: Tensor) -> Tensor:
        return self.transpose(self.a.flatten(0, 1), outputs.flatten(0, 1)).unflatten(0, self.a.shape[:2])

    @staticmethod
    def _each(function: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
        return function(a.flatten(0, 1)).unflatten(0, a.shape[:2])


class MaxPool(Layer):
    """Maximum pooling: linear once it is known which pixels win."""

    def __init__(self, module: nn.MaxPool2d) -> None:
        self.options = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)

    def forward(self, rows: Rows, a: Tensor) -> Tensor:
        """``[P, B, C, H', W']``."""
        self.shape = a.shape
        values, self.winners = F.max_pool2d(a.flatten(0, 1), *self.options, return_indices=True)
        return values.unflatten(0, a.shape[:2])

    def _back(self, outputs: Tensor) -> Tensor:
        inputs = outputs.new_zeros(self.shape[0] * self.shape[1], self.shape[2], self.shape[3] * self.shape[4])
        return inputs.scatter_add_(2, self.winners.flatten(2), outputs.flatten(0, 1).flatten(2)).view(self.shape)

    def backward(self, rows: Rows, delta: Tensor, products: Products) -> Tensor | None:
        """``[P, B, C, H, W]``."""
        return None if self.first else self._back(delta)

    def forward_again(self, rows: Rows, by_delta: Tensor | None, products: Products) -> Tensor | None:
        """``[P, B, C, H', W']``."""
        if by_delta is None:
            return None
        chosen = by_delta.flatten(0, 1).flatten(2).gather(2, self.winners.flatten(2))
        return chosen.view(*self.shape[:3], *self.winners.shape[2:])

    def backward_again(self, rows: Rows, by_output: Tensor, products: Products) -> Tensor:
        """``[P, B, C, H, W]``."""
        return self._back(by_output)


class ChainDistance(Distance):
    """Feed-forward chains: see the module's docstring. Make one with `chain_distance`."""

    layers: list[Layer]
    names: list[str]
    shared_rows: Rows

    def load(self, victims: Sequence[Victim]) -> Rows:
        """Targets, and weights unless they are shared."""
        rows: Rows = {}
        for layer in self.layers:
            rows |= layer.load(victims, self._stack)
            if self.shared_parameters is None:
                rows |= layer.weights(victims, self._stack)
        return rows

    @torch.no_grad()
    def evaluate(
        self, rows: Rows, images: Tensor, labels: Tensor, *, with_labels: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value and gradients by four sweeps over the layers."""
        rows = rows | self.shared_rows
        products = Products()
        a = images
        for layer in self.layers:
            a = layer.forward(rows, a)
        p, batch = a.softmax(2), a.shape[1]
        delta: Tensor | None = (p - labels) / batch
        for layer in reversed(self.layers):
            if delta is not None:
                delta = layer.backward(rows, delta, products)
        value = products.judge(self.objective, self.names)
        by_delta: Tensor | None = None
        for layer in self.layers:
            by_delta = layer.forward_again(rows, by_delta, products)
        assert by_delta is not None
        by_delta = by_delta / batch
        inner = (p * by_delta).sum(2, keepdim=True)
        a = p * (by_delta - inner)
        for layer in reversed(self.layers):
            a = layer.backward_again(rows, a, products)
        return value, a, inner - by_delta if with_labels else None


def chain_distance(
    model: nn.Module,
    objective: Objective,
    victims: Sequence[Victim],
    image_shape: tuple[int, int, int],
    batch: int,
    *,
    shared: bool,
    training_mode: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ChainDistance | None:
    """A fast distance for these victims, or None if the model is not a chain of layers known here.

    Args:
        model, objective, training_mode, device, dtype: as for `Distance`.
        victims: all that will be matched; `shared` says that their parameters are the same.
        image_shape: (C, H, W).
        batch: images per victim.
    """
    common = victims[0] if shared else None
    distance = ChainDistance(model, objective, shared=common, training_mode=training_mode, device=device, dtype=dtype)
    layers = _trace(distance.model, image_shape)
    if layers is None:
        return None
    for layer in layers:
        layer.first = True
        if layer.parameters:
            break
    for layer in layers:
        if isinstance(layer, FullyConnected) and all(has_rank(v.gradient[layer.weight], batch) for v in victims):
            layer.rank = batch
    distance.layers = layers
    distance.names = [name for name, _ in distance.model.named_parameters()]
    distance.shared_rows = {}
    if common is not None:
        for layer in layers:
            distance.shared_rows |= layer.weights([common], distance._stack)
    return distance


def factors(target: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Q ``[P, n, r]`` with orthonormal columns and M ``[P, m, r]`` with M Qᵀ ≈ `target` ``[P, m, n]``.

    A range finder with one power iteration (Halko 2011): exact where the rank is at most `rank`.
    """
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(target.shape[1], rank, generator=generator, dtype=torch.float64).to(target.device)
    wide = target.double()
    q = torch.linalg.qr(wide.mT @ probes).Q
    q = torch.linalg.qr(wide.mT @ (wide @ q)).Q
    return q.to(target.dtype), (wide @ q).to(target.dtype)


def has_rank(gradient: Tensor, rank: int) -> bool:
    """Whether `gradient` ``[m, n]`` is worth keeping in `rank` factors: far fewer than m or n, and enough for it."""
    if 4 * rank > min(gradient.shape):
        return False
    q, m = factors(gradient[None], rank)
    tolerance = 32 * torch.finfo(torch.float32).eps  # what a gradient computed in float32 is off by
    return bool((gradient - m @ q.mT).norm() <= tolerance * gradient.norm())


def _padded(matrices: Tensor) -> Tensor:
    """Zero columns added to ``[P, m, n]`` until rows are whole cache lines: see `_times`."""
    return F.pad(matrices, (0, -matrices.shape[2] % 16)).contiguous()


def _times(rows: Tensor, matrices: Tensor, columns: int) -> Tensor:
    """``[P, B, m] @ [P or 1, m, n]``, the first `columns` of n."""
    return (rows @ matrices.expand(len(rows), -1, -1))[..., :columns]


def _steady(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An elementwise function whose vector kernel also does the last few elements, which a scalar one rounds apart."""

    def apply(z: Tensor) -> Tensor:
        excess = -z.numel() % (64 * torch.get_num_threads())
        if not excess or z.device.type != "cpu":
            return function(z)
        return function(F.pad(z.flatten(), (0, excess)))[: z.numel()].view(z.shape)

    return apply


def _sigmoid() -> Elementwise:
    return Elementwise(_steady(torch.sigmoid), lambda z, h: h * (1 - h), lambda z, h, d: d * (1 - 2 * h))


def _tanh() -> Elementwise:
    return Elementwise(_steady(torch.tanh), lambda z, h: 1 - h * h, lambda z, h, d: -2 * h * d)


def _relu(inplace: bool = False) -> Elementwise:
    return Elementwise(torch.relu, lambda z, h: (z > 0).to(z.dtype), None)


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Elementwise:
    return Elementwise(
        lambda z: F.leaky_relu(z, negative_slope), lambda z, h: torch.where(z > 0, 1.0, negative_slope).to(z), None
    )


def _elu(alpha: float = 1.0, inplace: bool = False) -> Elementwise:
    return Elementwise(
        _steady(lambda z: F.elu(z, alpha)),
        lambda z, h: torch.where(z > 0, 1.0, h + alpha),
        lambda z, h, d: torch.where(z > 0, 0.0, d),
    )


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Elementwise:
    def slope(z: Tensor, h: Tensor) -> Tensor:
        return torch.where(beta * z > threshold, 1.0, _steady(torch.sigmoid)(beta * z))

    return Elementwise(_steady(lambda z: F.softplus(z, beta, threshold)), slope, lambda z, h, d: beta * d * (1 - d))


def _affine(scale: Tensor | float, shift: Tensor | float) -> Elementwise:
    """x · scale + shift, with constants that broadcast against ``[C, H, W]``."""
    return Elementwise(lambda z: z * scale + shift, lambda z, h: torch.zeros_like(z) + scale, None)


def _flatten() -> Rearrangement:
    return Rearrangement(lambda a: a.flatten(1), lambda a, out: out.reshape(a.shape))


def _average_pool(module: nn.AvgPool2d) -> Rearrangement:
    options = (module.kernel_size, module.stride, module.padding, module.ceil_mode, module.count_include_pad)

    def transpose(a: Tensor, out: Tensor) -> Tensor:
        kernel, stride, padding = (list(nn.modules.utils._pair(option)) for option in options[:3])
        return torch.ops.aten.avg_pool2d_backward(
            out, a, kernel, stride, padding, *options[3:], module.divisor_override
        )

    return Rearrangement(lambda a: F.avg_pool2d(a, *options, module.divisor_override), transpose)


_MODULES: dict[type[nn.Module], Callable[[Any], Layer]] = {
    nn.Sigmoid: lambda m: _sigmoid(),
    nn.Tanh: lambda m: _tanh(),
    nn.ReLU: lambda m: _relu(),
    nn.LeakyReLU: lambda m: _leaky_relu(m.negative_slope),
    nn.ELU: lambda m: _elu(m.alpha),
    nn.Softplus: lambda m: _softplus(m.beta, m.threshold),
    nn.AvgPool2d: _average_pool,
    nn.MaxPool2d: MaxPool,
}
_FUNCTIONS: dict[Any, Callable[..., Layer]] = {
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), _sigmoid),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), _tanh),
    **dict.fromkeys((torch.relu, F.relu, "relu"), _relu),
    F.leaky_relu: _leaky_relu,
    F.elu: _elu,
    F.softplus: _softplus,
}
_ARITHMETIC: dict[Any, Callable[[Any], Layer]] = {
    **dict.fromkeys((operator.add, torch.add), lambda c: _affine(1.0, c)),
    **dict.fromkeys((operator.sub, torch.sub), lambda c: _affine(1.0, -c)),
    **dict.fromkeys((operator.mul, torch.mul), lambda c: _affine(c, 0.0)),
    **dict.fromkeys((operator.truediv, torch.div), lambda c: _affine(1 / c, 0.0)),
}


def _trace(model: nn.Module, image_shape: tuple[int, int, int]) -> list[Layer] | None:
    """The layers of a chain in order; None for everything else."""
    try:
        graph = fx.symbolic_trace(model)
        layers = _read(graph, model)
    except Exception:  # whatever a stranger's forward does while it is traced: the general path knows it
        return None
    if layers is None or sorted(n for layer in layers for n in layer.parameters) != sorted(
        name for name, _ in model.named_parameters()
    ):
        return None
    # What the layers make of an image must be what the model makes of it.
    parameter = next(model.parameters())
    image = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(parameter)
    victim = Victim(dict(model.named_parameters()), {}, {})
    try:
        with torch.no_grad():
            a = image[None]
            for layer in layers:
                a = layer.forward(layer.weights([victim], lambda tensors: torch.stack(tensors).detach()), a)
            same = torch.allclose(a[0], model(image), rtol=1e-3, atol=1e-4)
    except RuntimeError:
        return None
    return layers if same else None


def _read(graph: fx.GraphModule, model: nn.Module) -> list[Layer] | None:
    layers: list[Layer] = []
    previous: fx.Node | None = None
    for node in graph.graph.nodes:
        if node.op == "output":
            return layers if node.args[0] is previous else None
        if node.op in ("placeholder", "get_attr"):
            previous = node if previous is None else previous
            continue
        if not node.args or node.args[0] is not previous:
            return None
        previous = node
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            if isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and not module.training):
                continue
            layers.append(_module(str(node.target), module))
        elif node.target in (torch.flatten, "flatten") and tuple(node.args[1:]) == (1,) and not node.kwargs:
            layers.append(_flatten())
        elif node.target in _FUNCTIONS:
            layers.append(_FUNCTIONS[node.target](*node.args[1:], **node.kwargs))
        else:
            layers.append(_ARITHMETIC[node.target](_constant(node.args[1], model)))
    return None


def _module(name: str, module: nn.Module) -> Layer:
    """The layer of a module; raises where it is not one that is known."""
    if type(module) is nn.Conv2d:
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise ValueError("a convolution that is not plain")
        return Convolution(name, module)
    if type(module) is nn.Linear:
        return FullyConnected(name, module)
    if type(module) is nn.Flatten and module.start_dim == 1 and module.end_dim == -1:
        return _flatten()
    return _MODULES[type(module)](module)


def _constant(argument: Any, model: nn.Module) -> Tensor | float:
    """A number, or a buffer of the model that broadcasts against ``[C, H, W]``."""
    if not isinstance(argument, fx.Node):
        return float(argument)
    if argument.op != "get_attr" or str(argument.target) in dict(model.named_parameters()):
        raise ValueError("not a constant")
    value: Tensor = operator.attrgetter(str(argument.target))(model).detach()
    if value.dim() > 4 or (value.dim() == 4 and len(value) != 1):
        raise ValueError("not the same for every image")
    return value
