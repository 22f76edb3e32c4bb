"""Our best, whatever the network: a look at model and update, and the inversion that works there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from fedleak.attacks.base import Inversion, Knowledge, LabelGuess, Run
from fedleak.attacks.chain import Layer
from fedleak.attacks.chain.elementwise import Elementwise
from fedleak.attacks.chain.rearrangement import MaxPool
from fedleak.attacks.inversion.features import FeaturesFirst
from fedleak.attacks.inversion.features.attack import chain_of, joined, unwound_of
from fedleak.attacks.inversion.features.body import hinge
from fedleak.attacks.inversion.features.unwind import Unwound
from fedleak.attacks.inversion.peeling import Peeling
from fedleak.attacks.problem import Problem, pose
from fedleak.attacks.results import Reconstruction
from fedleak.capture import Observation
from fedleak.errors import UsageError

FEATURES = "features first"
_SHARED, _EACH = 10, 7.5
"""Updates that share `seconds`, and seconds for each beyond: single images need about six to come to an end."""


class Chooser(Inversion):
    """Takes for each update what works on such a model and batch, and says in its results which that was, and why.

    - Chains of smooth monotone layers: `peeling`, with its own fallback.
    - Chains of convolutions with ReLUs or maximum pooling that end in fully connected layers, where these unwind:
      `features`. Stop reasons are then such as ``stalled by features first``.
    - Everything else: `peeling` too, which hands it to its fallback.

    In the results' ``details``, ``method`` and ``why`` say what was done.

    Args:
        peeling: with a fallback.
        features: for networks as people train them.
        seconds: planned for all updates of a call that go through `features`, on an ordinary core, where no time is
            given; a plan depends on no clock, and so repeats. Each beyond the tenth adds seven and a half.
    """

    def __init__(
        self, peeling: Peeling | None = None, features: FeaturesFirst | None = None, seconds: float = 25.0
    ) -> None:
        if not seconds > 0:
            raise UsageError(f"inversion.seconds={seconds}: must be above 0")
        self.peeling = peeling if peeling is not None else Peeling()
        self.features = features if features is not None else FeaturesFirst()
        self.seconds = seconds

    def adapted(self) -> Inversion:
        """As peeling: a defended update neither peels nor unwinds."""
        return self.peeling.adapted()

    def invert(
        self,
        observations: Sequence[Observation],
        guesses: Sequence[LabelGuess | None],
        knowledge: Knowledge,
        run: Run,
    ) -> list[Reconstruction]:
        """See `Inversion.invert`; all of it together takes `run.seconds` at most, about."""
        began = time.perf_counter()
        layers = chain_of(knowledge, observations)
        chosen: dict[int, list[tuple[Problem, Unwound]]] = {}
        why = _why_not(layers)
        if layers is not None and why is None:
            chosen = _unwinding(pose(observations, guesses, knowledge), layers)
        results: dict[int, Reconstruction] = {}

        def keep(index: int, result: Reconstruction) -> None:
            results[index] = result
            if run.on_result is not None:
                run.on_result(index, result)

        if chosen and layers is not None:
            self._by_features(chosen, layers, knowledge, run, keep)
        rest = [index for index in range(len(observations)) if index not in results]
        if rest:
            left = None if run.seconds is None else max(0.1, run.seconds - (time.perf_counter() - began))
            own = why or "its fully connected layers do not unwind: the samples are too many or too much alike"

            def of_rest(position: int, result: Reconstruction) -> None:
                result.details.setdefault("method", "gradient matching")
                result.details["why"] = own
                keep(rest[position], result)

            some = [observations[index] for index in rest], [guesses[index] for index in rest]
            self.peeling.invert(*some, knowledge, replace(run, seconds=left, on_result=of_rest))
        return [results[index] for index in range(len(observations))]

    def _by_features(
        self,
        chosen: dict[int, list[tuple[Problem, Unwound]]],
        layers: Sequence[Layer],
        knowledge: Knowledge,
        run: Run,
        keep: Callable[[int, Reconstruction], None],
    ) -> None:
        pairs = [pair for of_one in chosen.values() for pair in of_one]
        planned = run.seconds if run.seconds is not None else self.seconds + _EACH * max(0, len(pairs) - _SHARED)
        parts: dict[int, list[Reconstruction]] = {}

        def on_part(position: int, part: Reconstruction) -> None:
            index = pairs[position][0].index
            of_one = parts.setdefault(index, [])
            of_one.append(part)
            if len(of_one) == len(chosen[index]):
                result = joined(of_one)
                result.stop_reason = f"{result.stop_reason} by {FEATURES}"
                result.details["method"] = FEATURES
                result.details["why"] = "ReLUs or pooling, and fully connected layers that unwind to exact features"
                keep(index, result)

        own = replace(run, on_result=on_part)
        problems, unwound = [problem for problem, _ in pairs], [found for _, found in pairs]
        self.features.solve(problems, unwound, layers, knowledge, own, planned=planned)


def _why_not(layers: Sequence[Layer] | None) -> str | None:
    """Why features do not come first in a model; None where they may."""
    if layers is None:
        return "the model branches, or has layers that no closed form knows"
    if not any(isinstance(layer, MaxPool) or (isinstance(layer, Elementwise) and hinge(layer)) for layer in layers):
        return "every layer is smooth, and may be undone one by one"
    return None


def _unwinding(problems: Sequence[Problem], layers: Sequence[Layer]) -> dict[int, list[tuple[Problem, Unwound]]]:
    """The observations, by index, whose every problem unwinds."""
    found: dict[int, list[tuple[Problem, Unwound | None]]] = {}
    for problem in problems:
        found.setdefault(problem.index, []).append((problem, unwound_of(problem, layers)))
    return {
        index: [(problem, unwound) for problem, unwound in pairs if unwound is not None]
        for index, pairs in found.items()
        if all(unwound is not None for _, unwound in pairs)
    }
