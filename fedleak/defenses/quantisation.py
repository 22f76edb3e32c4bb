"""Quantisation: an update on few levels, rounded to the nearest or at random, or its sign alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedleak.defenses.base import Defense, Imitation
from fedleak.errors import UsageError
from fedleak.training import LocalTraining, Tensors

_SPREAD = 0.756
"""Standard deviation of a normal variable's magnitude over its mean: what a sign leaves open."""
_SLACK = 0.05
"""How much a wrong sign is forgiven, in units of what was sent: less finds images nearer to the truth, and slower."""


class Uniform(Defense):
    """Every tensor on evenly spaced levels between minus and plus its largest element; int8 by default.

    It saves traffic. What it hides are details below a step, a hundredth of the largest element with int8.

    Args:
        bits: of each element, 2 to 16: levels −(2^(bits−1) − 1) … 2^(bits−1) − 1 times the step.

    Raises:
        UsageError: `bits` is no whole number from 2 to 16.

    References:
        Zhu, Liu, Han. Deep leakage from gradients. NeurIPS 2019 (int8).
    """

    knob: ClassVar[str | None] = "bits"

    def __init__(self, bits: int = 8) -> None:
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
            raise UsageError(f"defense.bits={bits}: must be a whole number from 2 to 16, such as 8")
        self.bits = bits

    @property
    def levels(self) -> int:
        """Steps from zero to the largest element."""
        return int(2 ** (self.bits - 1) - 1)

    def apply(self, update: Tensors, *, generator: torch.Generator) -> Tensors:
        """Rounded to the nearest level."""
        return {
            n: torch.round(value / step) * step if (step := self._step(value)) > 0 else value
            for n, value in update.items()
        }

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation:
        """The update itself, with a uniform draw from a step as noise; the largest element tells the step."""
        return Imitation(dict, {name: self._step(value) / 12**0.5 for name, value in observed.items()})

    def _step(self, value: Tensor) -> float:
        if not value.is_floating_point() or not value.numel():
            return 0.0
        return float(value.abs().amax()) / self.levels


class Stochastic(Defense):
    """Every tensor on `levels` evenly spaced magnitudes up to its ℓ2 norm, rounded up or down at random, without bias.

    It saves traffic, and its error is large: with one level most elements of a large tensor become zero.

    Args:
        levels: steps from zero to the norm, at least 1.

    Raises:
        UsageError: `levels` is no whole number of at least 1.

    References:
        Alistarh, Grubic, Li, Tomioka, Vojnovic. QSGD: Communication-efficient SGD via gradient quantization and
        encoding. NeurIPS 2017.
    """

    knob: ClassVar[str | None] = "levels"

    def __init__(self, levels: int = 64) -> None:
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 1:
            raise UsageError(f"defense.levels={levels}: must be a whole number of at least 1, such as 64")
        self.levels = levels

    def apply(self, update: Tensors, *, generator: torch.Generator) -> Tensors:
        """‖v‖ / k · sign(v) · (⌊k |v| / ‖v‖⌋, or one more with the probability of the rest)."""
        result = dict(update)
        for name, value in update.items():
            norm = float(value.double().norm()) if value.is_floating_point() else 0.0
            if norm > 0:
                place = value.abs() * (self.levels / norm)
                drawn = torch.rand(value.shape, generator=generator, device=generator.device).to(value)
                up = (drawn < place - place.floor()).to(value)
                result[name] = value.sign() * (place.floor() + up) * (norm / self.levels)
        return result

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation:
        """The update itself; the noise is that of the roundings, step · √(f (1 − f)), averaged over the rest f.

        The step is the smallest magnitude sent that is not zero, of which all others are multiples. Its noise is that
        of the tensor as a whole, as the sum of squares tells it: where most elements are zero, so is most of the rest.
        """
        noise: dict[str, Tensor | float] = {}
        for name, value in observed.items():
            step = grid_step(value)
            # E[v̂²] = v² + step² f (1 − f), and ‖v‖ is levels · step, so that the excess over ‖v‖² is the noise.
            excess = float(value.double().square().sum()) - (self.levels * step) ** 2
            noise[name] = min(step / 2, (max(excess, 0.0) / max(1, value.numel())) ** 0.5) or step / 6**0.5
        return Imitation(dict, noise)


class Sign(Defense):
    """Only the sign of every element, times the tensor's mean magnitude, so that the update keeps its size.

    One bit an element. What the signs of many elements leave open of an image is little.

    Args:
        scaled: times the mean magnitude (Karimireddy 2019); without it ±1 are sent, as signSGD does.

    References:
        Bernstein, Wang, Azizzadenesheli, Anandkumar. signSGD: Compressed optimisation for non-convex problems. ICML
        2018.
        Karimireddy, Rebjock, Stich, Jaggi. Error feedback fixes SignSGD and other gradient compression schemes. ICML
        2019.
    """

    def __init__(self, scaled: bool = True) -> None:
        if not isinstance(scaled, bool):
            raise UsageError(f"defense.scaled={scaled}: must be true or false")
        self.scaled = scaled

    def apply(self, update: Tensors, *, generator: torch.Generator) -> Tensors:
        """sign(v) · mean |v|; an element that is zero stays zero."""
        return {
            n: value.sign() * (value.abs().mean() if self.scaled else 1.0) if value.is_floating_point() else value
            for n, value in update.items()
        }

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation:
        """See `signs`."""
        return signs(observed)


def signs(observed: Mapping[str, Tensor]) -> Imitation:
    """An update that is all signs: what agrees with an observed sign is as good as it, else it is off by its size.

    Sizes are relative to the tensor's root mean square, so that a gradient that shrinks does not seem to agree.
    """
    size = {name: value.abs().amax() if value.numel() else value.new_zeros(()) for name, value in observed.items()}
    sign = {name: value.sign() for name, value in observed.items()}

    def function(update: Tensors) -> Tensors:
        result = dict(update)
        for name, value in update.items():
            if not value.is_floating_point():
                continue
            unit = value / value.square().mean().clamp_min(torch.finfo(value.dtype).tiny).sqrt()
            wrong = (sign[name].to(value) * unit).clamp_max(0)
            result[name] = size[name].to(value) * sign[name].to(value) * (1 + wrong)
        return result

    sizes = {name: float(value) for name, value in size.items()}
    return Imitation(function, {n: _SLACK * v for n, v in sizes.items()}, {n: _SPREAD * v for n, v in sizes.items()})


def grid_step(value: Tensor) -> float:
    """The smallest magnitude in a tensor that is not zero; 0.0 where all are."""
    sizes = value.abs()
    sizes = sizes[sizes > 0]
    return float(sizes.amin()) if sizes.numel() else 0.0
