"""An attack is a label inference followed by an inversion, over any number of observations at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from fedleak.attacks.base import Inversion, Knowledge, LabelGuess, LabelInference, Progress, Reconstruction
from fedleak.capture import Observation, Payload
from fedleak.errors import UsageError
from fedleak.threat import ThreatModel

if TYPE_CHECKING:
    from fedleak.attacks.store import ReconstructionStore


class LabelsOnly(Inversion):
    """No images: the inferred labels are the whole reconstruction (grey images, stop reason ``labels_only``)."""

    needs_scale = False

    def invert(
        self,
        observations: Sequence[Observation],
        guesses: Sequence[LabelGuess | None],
        knowledge: Knowledge,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        on_result: Callable[[int, Reconstruction], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> list[Reconstruction]:
        """Wrap each guess as a reconstruction; observations without a guess get no labels."""
        results = []
        for index, (observation, guess) in enumerate(zip(observations, guesses, strict=True)):
            labels = torch.empty(0, dtype=torch.int64) if guess is None else guess.best
            results.append(
                Reconstruction(
                    round=observation.round,
                    client=observation.client,
                    images=torch.full((len(labels), *knowledge.image_shape), 0.5),
                    labels=labels,
                    objective=float("nan"),
                    evaluations=0,
                    seconds=0.0,
                    stop_reason="labels_only",
                    restarts=0,
                )
            )
            if on_result is not None:
                on_result(index, results[-1])
        return results


class Attack:
    """A label inference and an inversion.

    Args:
        labels: where the labels come from.
        inversion: how the images are rebuilt.
        name: for tables.
        candidates: how many label multisets to ask the label inference for; the inversion keeps the best.
    """

    def __init__(
        self, labels: LabelInference, inversion: Inversion, *, name: str = "attack", candidates: int = 1
    ) -> None:
        self.labels = labels
        self.inversion = inversion
        self.name = name
        self.candidates = candidates

    def check(self, threat: ThreatModel, payload: Payload = "gradient", samples: int = 1) -> None:
        """Raise `UsageError` if the attack needs what `threat` withholds, or cannot take `samples` an update."""
        most = self.labels.most_samples
        if most is not None and samples > most:
            raise UsageError(
                f"attack={self.name} ({type(self.labels).__name__}) reads {most} sample an update, not {samples}; "
                "choose federation.batch_size=1 and federation.local_steps=1, or attack=fedleak"
            )
        for part in (self.labels, self.inversion):
            threat.require(part.needs, f"attack={self.name} ({type(part).__name__})")
        if payload == "weights" and not threat.hyperparameters and self.inversion.needs_scale:
            raise UsageError(
                f"attack={self.name} needs the learning rate to turn new weights into a gradient; grant it with "
                "threat.hyperparameters=true, or choose federation.payload=gradient or attack/inversion=none"
            )

    def __call__(
        self,
        observations: Sequence[Observation],
        knowledge: Knowledge,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        store: ReconstructionStore | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> list[Reconstruction]:
        """Attack all observations in one call.

        Args:
            observations: N observations. Unusable ones (`Observation.error`) are reported, not attacked.
            knowledge: what else the attacker holds.
            device: where to compute.
            seed: decides every random choice.
            store: where each reconstruction is written as it finishes; those already there are not computed again.
            on_progress: called now and then.

        Returns:
            N reconstructions, in order. Unusable observations come with no images and their error as stop reason.

        Raises:
            UsageError: the attack needs what the threat model withholds, or cannot work on these observations.
        """
        scale_unknown = any(o.error is None and o.scale is None for o in observations)
        self.check(knowledge.threat, "weights" if scale_unknown else "gradient")
        results: list[Reconstruction | None] = [
            _unusable(o, knowledge) if o.error is not None else store.load(o.round, o.client) if store else None
            for o in observations
        ]
        todo = [i for i, result in enumerate(results) if result is None]
        pending = [observations[i] for i in todo]
        if not pending:
            return [result for result in results if result is not None]
        start = time.perf_counter()
        guesses = self.labels.infer(pending, knowledge, candidates=self.candidates, seed=seed)
        share = (time.perf_counter() - start) / len(pending)

        def keep(index: int, result: Reconstruction) -> None:
            result.seconds += share
            results[todo[index]] = result
            if store is not None:
                store.write(result)

        self.inversion.invert(
            pending, guesses, knowledge, device=device, seed=seed, on_result=keep, on_progress=on_progress
        )
        missing = [observations[i] for i in todo if results[i] is None]
        if missing:
            where = f"round {missing[0].round}, client {missing[0].client}"
            raise RuntimeError(f"{type(self.inversion).__name__} gave no result for {where}")
        return [result for result in results if result is not None]


def _unusable(observation: Observation, knowledge: Knowledge) -> Reconstruction:
    return Reconstruction(
        round=observation.round,
        client=observation.client,
        images=torch.empty(0, *knowledge.image_shape),
        labels=torch.empty(0, dtype=torch.int64),
        objective=float("nan"),
        evaluations=0,
        seconds=0.0,
        stop_reason=observation.error or "unusable",
        restarts=0,
    )
