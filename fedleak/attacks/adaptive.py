"""The adaptive attacker: what it makes of a defense that it was told of, or that it sees in the update itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge
from fedleak.defenses.base import ClientView, Defense, Imitation
from fedleak.defenses.clipping import Sized
from fedleak.defenses.masking import Mask
from fedleak.defenses.precision import FORMATS, rounding
from fedleak.defenses.pruning import Pruning
from fedleak.defenses.quantisation import Sign, signs
from fedleak.defenses.svd import is_matrix, low_rank, matrix
from fedleak.errors import UsageError
from fedleak.training import LocalTraining, Tensors

_ZEROS = 0.01
"""The share of a tensor's elements that are exactly zero from which it was pruned or masked."""
_LARGE = 64
"""Elements from which a tensor's values tell on what grid they lie."""
_ON_GRID = 2e-3
"""How far from its grid an element of a quantised tensor is, at most, in steps."""
_CUT = 1e-5
"""A singular value below so much of the largest was cut off."""


def seen_through(knowledge: Knowledge, adaptive: bool) -> Knowledge:
    """What an attacker makes of what it knows.

    An adaptive one sends its guesses through the imitation of the defense: of the one it was told of
    (``threat.defense=true``), else of what it estimates from each update. A naive one at most knows how much noise is
    in the update, if it was told of the defense.
    """
    if adaptive:
        return replace(knowledge, defense=knowledge.defense or Estimated())
    return knowledge if knowledge.defense is None else replace(knowledge, defense=NoiseOnly(knowledge.defense))


def require_imitation(defense: Defense, names: Mapping[str, Tensor], training: LocalTraining) -> None:
    """Raise `UsageError` for a defense that an adaptive attacker was told of and that has no imitation."""
    seen = defense.seeing(ClientView(names, {}))
    if seen.imitate({name: torch.ones_like(value) for name, value in names.items()}, training) is None:
        raise UsageError(
            f"attack.adaptive=true: {type(defense).__name__} says nothing of how to imitate it; give it an imitate, or "
            "leave threat.defense=false, so that the attacker goes by what the updates show"
        )


class NoiseOnly(Defense):
    """Another defense, of which the attacker takes the size of the noise and nothing else.

    Args:
        defense: what the clients do.
    """

    def __init__(self, defense: Defense) -> None:
        self.defense = defense

    def seeing(self, client: ClientView) -> Defense:
        return NoiseOnly(self.defense.seeing(client))

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation | None:
        """Its noise, beside an update that is left as it is."""
        found = self.defense.imitate(observed, training)
        return None if found is None else Imitation(dict, found.noise)


class Estimated(Defense):
    """What an attacker who was told nothing sees in the update itself.

    - Two magnitudes or fewer in every large tensor: signs.
    - Magnitudes that are all multiples of one number: a quantiser, whose step is that number.
    - Numbers that a 16-bit format holds exactly: rounding to it.
    - Exact zeros: a mask. They are left out.
    - A rank below the shape's: a truncated decomposition.
    - Any of these, and none: the size may have been clipped. Only the direction counts.

    Of noise that is added to an update nothing is said here; an attack that estimates it by itself does so.
    """

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation:
        """The first of these that fits, and the size."""
        large = _large(observed)
        if signs_alone(observed):
            return signs(observed)
        found = _grid(observed, large) or _format(observed, large) or _zeros(observed) or _rank(observed)
        sized = Sized(observed)
        if found is None:
            return Imitation(sized, None)
        if found.function is dict:
            return Imitation(sized, found.noise)
        inner = found.function

        def function(update: Tensors) -> Tensors:
            return sized(inner(update))

        return Imitation(function, found.noise)


def signs_alone(observed: Mapping[str, Tensor]) -> bool:
    """Whether every large tensor of an update has one magnitude, and perhaps zeros."""
    large = _large(observed)
    return bool(large) and all(_magnitudes(value) <= 1 for value in large.values())


def _large(observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: v for n, v in observed.items() if v.is_floating_point() and v.numel() >= _LARGE}


def lookalike(observed: Mapping[str, Tensor]) -> Callable[[Tensors, torch.Generator], Tensors]:
    """What turns other updates into such as the observed one looks: signs, pruned by as much, or as they are.

    Args:
        observed: name -> tensor.

    Returns:
        An update and a source of randomness -> the update as the client would have sent it.
    """
    if signs_alone(observed):
        return lambda update, random: Sign().apply(update, generator=random)
    parts = {n: Pruning(min(int((v == 0).sum()), v.numel() - 1) / v.numel()) for n, v in observed.items()}

    def pruned(update: Tensors, random: torch.Generator) -> Tensors:
        return {n: parts[n].apply({n: value}, generator=random)[n] for n, value in update.items()}

    return pruned


def _magnitudes(value: Tensor) -> int:
    """How many magnitudes there are beside zero, 2 standing for any more than one."""
    sizes = value.abs()
    sizes = sizes[sizes > 0]
    if not sizes.numel():
        return 0
    return 1 if float(sizes.amax()) <= float(sizes.amin()) * (1 + 1e-5) else 2


def _grid(observed: Mapping[str, Tensor], large: Mapping[str, Tensor]) -> Imitation | None:
    """A quantiser of evenly spaced levels, where every large tensor lies on such."""
    steps = {name: _step(value) for name, value in large.items()}
    if not steps or not all(steps.values()):
        return None
    top = {n: float(v.abs().amax()) if v.is_floating_point() and v.numel() else 0.0 for n, v in observed.items()}
    levels = {round(top[name] / step) for name, step in steps.items()}
    nearest = len(levels) == 1  # the largest of every tensor is the last of as many levels
    noise: dict[str, Tensor | float] = {}
    for name, value in observed.items():
        if nearest:
            noise[name] = top[name] / levels.copy().pop() / 12**0.5
        else:  # at random: twice the variance
            noise[name] = (steps.get(name) or _least_gap(value)) / 6**0.5
    return Imitation(dict, noise)


def _step(value: Tensor) -> float:
    """The step of the grid that a tensor lies on, with fewer places than elements; 0.0 where there is none."""
    sizes = torch.unique(value.detach().double().abs())
    sizes = sizes[sizes > 0]
    if not 2 <= sizes.numel() < value.numel() / 2:
        return 0.0
    top = float(sizes[-1])
    # The largest tells the step best: the smallest has few digits.
    step = top / round(top / max(_least_gap(value), 1e-300))
    places = sizes / step
    on = bool(((places - places.round()).abs() < _ON_GRID * (1 + 1e-2 * places)).all())
    return step if on else 0.0


def _least_gap(value: Tensor) -> float:
    """The least distance between two magnitudes of a tensor, or of one from zero; rounding is none."""
    sizes = torch.unique(value.detach().double().abs())
    gaps = torch.cat([sizes[:1], sizes.diff()])
    gaps = gaps[gaps > 1e-5 * sizes[-1]] if sizes.numel() else gaps
    return float(gaps.amin()) if gaps.numel() else 0.0


def _format(observed: Mapping[str, Tensor], large: Mapping[str, Tensor]) -> Imitation | None:
    """Rounding to a 16-bit format, where it holds every element exactly."""
    for dtype in FORMATS.values():
        if large and all(bool((value.to(dtype).to(value.dtype) == value).all()) for value in large.values()):
            return Imitation(dict, {name: rounding(value, dtype) for name, value in observed.items()})
    return None


def _zeros(observed: Mapping[str, Tensor]) -> Imitation | None:
    """A mask, where a tensor has more zeros than chance gives."""
    kept = {name: value != 0 for name, value in observed.items()}
    if all(float((~mask).float().mean()) < _ZEROS for mask in kept.values() if mask.numel()):
        return None
    return Imitation(Mask(kept), None)


def _rank(observed: Mapping[str, Tensor]) -> Imitation | None:
    """A truncated decomposition, of the tensors whose rank is below their shape's."""
    ranks = {}
    for name, value in observed.items():
        if is_matrix(value):
            values = torch.linalg.svdvals(matrix(value).double())
            rank = int((values > _CUT * values[0]).sum())
            if 0 < rank < len(values):
                ranks[name] = rank
    return replace(low_rank(observed, ranks), noise=None) if ranks else None
