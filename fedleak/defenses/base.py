"""What a defense is: a transform of the update, applied on the client before anything leaves it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fedleak.errors import UsageError


class Defense:
    """A small transform of an update; this one changes nothing. Subclass it in a file of your own and name it by
    ``_target_``.

    The update is the change that the client sends: a gradient, or new minus old weights. A strength in the units of
    the update (a noise's standard deviation, say) therefore weighs more on a ``weights`` payload, whose values are
    about lr × local steps times a gradient's.
    """

    def apply(self, update: dict[str, Tensor], *, generator: torch.Generator) -> dict[str, Tensor]:
        """The defended update. Pure: `update` and its tensors are never modified.

        Args:
            update: name -> tensor of any shape, what the client would send without a defense.
            generator: the only source of randomness, so that a seed decides the noise.

        Returns:
            A new dictionary, same names in the same order, shapes, dtypes and devices; what stays as it was may share
            its memory with `update`.
        """
        return dict(update)


class NoDefense(Defense):
    """The update leaves the client as it is."""


class Chain(Defense):
    """Several defenses, one after the other.

    Args:
        parts: the defenses, the first applied first.

    Raises:
        UsageError: `parts` is empty or holds something that has no `apply`.
    """

    def __init__(self, parts: Iterable[Defense]) -> None:
        self.parts = list(parts)
        if not self.parts:
            raise UsageError("defense.parts=[] has no defense in it; name at least one, or choose defense=none")
        for index, part in enumerate(self.parts):
            if not callable(getattr(part, "apply", None)):
                raise UsageError(
                    f"defense.parts[{index}]={part!r} is no defense; give a node such as "
                    "{_target_: fedleak.defenses.Gaussian, std: 0.01}"
                )

    def apply(self, update: dict[str, Tensor], *, generator: torch.Generator) -> dict[str, Tensor]:
        result = dict(update)
        for part in self.parts:
            result = part.apply(result, generator=generator)
        return result


def non_negative(key: str, value: float) -> float:
    """`value` as a float, or a `UsageError` that names `key` unless it is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise UsageError(f"{key}={value} is no strength; give a finite number of at least 0")
    return float(value)
