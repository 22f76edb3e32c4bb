"""What a defense is: what a client does to its update before anything leaves it, and how an attacker imitates that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import jvp

from fedleak.errors import UsageError
from fedleak.training import LocalTraining, Tensors


@dataclass(frozen=True)
class Imitation:
    """What is known of the way from an undefended to the observed update, by one who knows the defense.

    Attributes:
        function: the change that a client would send undefended -> the one that it sends, but for random noise; out of
            place and differentiable.
        noise: name -> standard deviation, a number or one for each element, of what the observed change differs by from
            `function` of the true one, in the units of the change; None where that cannot be told.
        spread: where `function` is flat about all that agrees with the observed update, so that what an update tells
            cannot be read off its derivatives: the standard deviation of the observed one about the true one itself.
    """

    function: Callable[[Tensors], Tensors]
    noise: Mapping[str, Tensor | float] | None
    spread: Mapping[str, Tensor | float] | None = None


@dataclass(frozen=True)
class ClientView:
    """What a defense may look at where it is used: by a client all of it, by an attacker who imitates it, no images.

    Attributes:
        parameters, buffers: name -> tensor, where the client's training starts.
        model: the architecture; its own weights mean nothing.
        images: ``[B, C, H, W]``, the private batches of the round.
        labels: ``[B]``.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    model: nn.Module | None = None
    images: Tensor | None = None
    labels: Tensor | None = None


class Defense:
    """Four hooks, of which each by default changes nothing. Subclass it in a file of your own and name it by
    ``_target_``.

    The update is the change that the client sends: a gradient, or new minus old weights. A strength in the units of
    the update (a noise's standard deviation, say) therefore weighs more on a ``weights`` payload, whose values are
    about lr × local steps times a gradient's.
    """

    knob: ClassVar[str | None] = None
    """The setting that says how strong it is, None where there is no such."""

    feedback: bool = False
    """Whether the client adds what a round withheld of its change to the next one's, before it defends that."""

    @property
    def per_example(self) -> bool:
        """Whether `examples` does anything, so that clients compute the gradient of every sample."""
        return type(self).examples is not Defense.examples

    def seeing(self, client: ClientView) -> Defense:
        """Before a round: this defense as it is used on this client, in this round; by default itself.

        For one that goes by the weights or by the private images. The original is never modified.
        """
        return self

    def data(
        self, images: Tensor, labels: Tensor, *, classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Before training: what the client trains on in place of its private samples. Pure.

        Args:
            images: ``[B, C, H, W]``, of one local step.
            labels: ``[B]`` int64.
            classes: of the model.
            generator: the only source of randomness.

        Returns:
            As many images, and labels: ``[B]`` or shares of the classes ``[B, classes]``.
        """
        return images, labels

    def examples(self, gradients: Tensors, *, generator: torch.Generator) -> Tensors:
        """Inside a local step: the defended gradients of its samples, whose mean the client then trains with. Pure.

        Args:
            gradients: name -> ``[B, ...]``.
            generator: the only source of randomness.

        Returns:
            A new dictionary, same names in the same order, shapes, dtypes and devices.
        """
        return dict(gradients)

    def apply(self, update: Tensors, *, generator: torch.Generator) -> Tensors:
        """Before sending: the defended update. Pure: `update` and its tensors are never modified.

        Args:
            update: name -> tensor of any shape, what the client would send without a defense.
            generator: the only source of randomness, so that a seed decides the noise.

        Returns:
            A new dictionary, same names in the same order, shapes, dtypes and devices; what stays as it was may share
            its memory with `update`.
        """
        return dict(update)

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation | None:
        """For an attacker who knows this defense: what it makes of an update, as far as an observed one tells.

        Args:
            observed: name -> tensor, the change that was sent.
            training: how the client trained, as far as the attacker knows.

        Returns:
            None where the defense cannot be imitated.
        """
        return Imitation(dict, dict.fromkeys(observed, 0.0))

    def epsilon(self, *, rounds: int, local_steps: int, sample_rate: float, delta: float) -> float | None:
        """ε of (ε, δ)-differential privacy after a whole federation; None where the defense promises none.

        Args:
            rounds: that a client takes part in.
            local_steps: of each round.
            sample_rate: share of the client's samples that a step sees.
            delta: the δ.
        """
        return None

    def reconstruction(self, *, rounds: int, local_steps: int, sample_rate: float, guess: float) -> float | None:
        """The most that the chance of reconstructing a sample can be after a whole federation; None without a promise.

        Args:
            rounds, local_steps, sample_rate: as for `epsilon`.
            guess: the chance without any update, see `fedleak.defenses.accountant.reconstruction_bound`.
        """
        return None


class NoDefense(Defense):
    """The update leaves the client as it is."""


class Chain(Defense):
    """Several defenses, one after the other.

    Args:
        parts: the defenses, the first applied first.

    Raises:
        UsageError: `parts` is empty or holds something that is no `Defense`.
    """

    def __init__(self, parts: Iterable[Defense]) -> None:
        self.parts = list(parts)
        if not self.parts:
            raise UsageError("defense.parts=[] has no defense in it; name at least one, or choose defense=none")
        for index, part in enumerate(self.parts):
            if not isinstance(part, Defense):
                raise UsageError(
                    f"defense.parts[{index}]={part!r} is no defense; give a node such as "
                    "{_target_: fedleak.defenses.Gaussian, std: 0.01}"
                )

    @property
    def per_example(self) -> bool:
        return any(part.per_example for part in self.parts)

    @property
    def feedback(self) -> bool:  # type: ignore[override]
        return any(part.feedback for part in self.parts)

    def seeing(self, client: ClientView) -> Defense:
        return Chain([part.seeing(client) for part in self.parts])

    def data(
        self, images: Tensor, labels: Tensor, *, classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        for part in self.parts:
            images, labels = part.data(images, labels, classes=classes, generator=generator)
        return images, labels

    def examples(self, gradients: Tensors, *, generator: torch.Generator) -> Tensors:
        for part in self.parts:
            gradients = part.examples(gradients, generator=generator)
        return dict(gradients)

    def apply(self, update: Tensors, *, generator: torch.Generator) -> Tensors:
        result = dict(update)
        for part in self.parts:
            result = part.apply(result, generator=generator)
        return result

    def epsilon(self, *, rounds: int, local_steps: int, sample_rate: float, delta: float) -> float | None:
        """The least of the parts': what comes after a private release keeps its privacy."""
        given = {"rounds": rounds, "local_steps": local_steps, "sample_rate": sample_rate, "delta": delta}
        found = [part.epsilon(**given) for part in self.parts]  # type: ignore[arg-type]
        return min((value for value in found if value is not None), default=None)

    def reconstruction(self, *, rounds: int, local_steps: int, sample_rate: float, guess: float) -> float | None:
        """The least of the parts', as for `epsilon`."""
        given = {"rounds": rounds, "local_steps": local_steps, "sample_rate": sample_rate, "guess": guess}
        found = [part.reconstruction(**given) for part in self.parts]  # type: ignore[arg-type]
        return min((value for value in found if value is not None), default=None)

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation | None:
        """The parts' imitations, each told of the observed update what came out of the last; their noise adds up.

        A part's noise goes on through those after it as through an elementwise function, linear around the observed
        update: exact for noise and pruning.
        """
        found = [part.imitate(observed, training) for part in self.parts]
        known = [imitation for imitation in found if imitation is not None]
        if len(known) < len(found):
            return None

        def function(update: Tensors) -> Tensors:
            for imitation in known:
                update = imitation.function(update)
            return update

        at = dict(observed)
        noise: dict[str, Tensor | float] = dict.fromkeys(observed, 0.0)
        for imitation in known:
            spread = {name: torch.zeros_like(value) + noise[name] for name, value in at.items()}
            spread = jvp(imitation.function, (at,), (spread,))[1]
            own = imitation.noise or dict.fromkeys(spread, 0.0)
            noise = {name: (value**2 + own[name] ** 2) ** 0.5 for name, value in spread.items()}
        return Imitation(function, noise)


def leaving(defense: Defense, change: Mapping[str, Tensor], *, generator: torch.Generator) -> Tensors:
    """What leaves the client of a change: what the defense returned, and nothing else.

    The defense gets a copy, so that one that works in place cannot let the undefended change through.

    Raises:
        UsageError: it returned other names or another dtype, so that nothing leaves.
    """
    given = {name: value.clone() for name, value in change.items()}
    returned = defense.apply(given, generator=generator)
    who = f"defense={type(defense).__name__}"
    if returned.keys() != change.keys():
        odd = sorted(returned.keys() ^ change.keys())[0]
        what = "left out" if odd in change else "made up"
        raise UsageError(f"{who} {what} {odd}, and the update is withheld; let apply return the names that it is given")
    for name, value in change.items():
        if returned[name].dtype != value.dtype:
            raise UsageError(
                f"{who} made {returned[name].dtype} of {name}, which is {value.dtype}, and the update is withheld; "
                "let apply keep dtypes"
            )
    return {name: returned[name] for name in change}


def non_negative(key: str, value: float) -> float:
    """`value` as a float, or a `UsageError` that names `key` unless it is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise UsageError(f"{key}={value} is no strength; give a finite number of at least 0")
    return float(value)


def positive(key: str, value: float) -> float:
    """`value` as a float, or a `UsageError` that names `key` unless it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise UsageError(f"{key}={value} is no strength; give a finite number above 0")
    return float(value)
