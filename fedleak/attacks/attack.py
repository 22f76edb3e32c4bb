"""An attack is a label inference followed by an inversion, over any number of observations at once."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedleak.attacks.adaptive import seen_through
from fedleak.attacks.base import Inversion, Knowledge, LabelGuess, LabelInference, Run
from fedleak.attacks.labels.joint import Joint
from fedleak.attacks.results import Progress, Reconstruction, StopReason
from fedleak.attacks.store import ReconstructionStore
from fedleak.attacks.views import Updates, View
from fedleak.capture import Observation
from fedleak.errors import FedleakError, UsageError, printable
from fedleak.threat import ThreatModel
from fedleak.training import LocalTraining

log = logging.getLogger("fedleak")


class LabelsOnly(Inversion):
    """No images: the inferred labels are the whole reconstruction (grey images, stop reason ``labels_only``)."""

    needs_scale = False

    def adapted(self) -> Inversion:
        """Refused: there are no images to send through a defense."""
        raise UsageError(
            "attack.adaptive=true: this attack rebuilds no images that could be sent through a defense; leave it "
            "false, or choose attack=fedleak"
        )

    def invert(
        self,
        observations: Sequence[Observation],
        guesses: Sequence[LabelGuess | None],
        knowledge: Knowledge,
        run: Run,
    ) -> list[Reconstruction]:
        """Wrap each guess as a reconstruction; observations without a guess get no labels."""
        results = []
        for index, (observation, guess) in enumerate(zip(observations, guesses, strict=True)):
            labels = torch.empty(0, dtype=torch.int64) if guess is None else guess.best
            images = torch.full((len(labels), *knowledge.image_shape), 0.5)
            results.append(_without_search(observation, images, labels, StopReason.LABELS_ONLY))
            if run.on_result is not None:
                run.on_result(index, results[-1])
        return results


class Attack:
    """A label inference and an inversion.

    Args:
        labels: where the labels come from.
        inversion: how the images are rebuilt.
        name: for tables.
        candidates: how many label multisets to ask the label inference for; the inversion keeps the best.
        view: what of the captures the attacker sees; None for every client's update.
        adaptive: whether guesses go through the clients' defense as `fedleak.attacks.adaptive` imitates it.

    Raises:
        UsageError: `adaptive`, and the inversion rebuilds no images.
    """

    def __init__(
        self,
        labels: LabelInference,
        inversion: Inversion,
        *,
        name: str = "attack",
        candidates: int = 1,
        view: View | None = None,
        adaptive: bool = False,
    ) -> None:
        self.labels = labels.adapted() if adaptive else labels
        self.inversion = inversion.adapted() if adaptive else inversion
        self.adaptive = adaptive
        self.name = name
        self.candidates = candidates
        self.view = view if view is not None else Updates()

    def check(self, threat: ThreatModel, training: LocalTraining | None = None) -> None:
        """Raise `UsageError` if the attack needs what `threat` withholds, or cannot take such updates.

        Args:
            threat: what is granted.
            training: how clients train, all of it; None where that is not at hand.
        """
        for part in (self.labels, self.inversion):
            threat.require(part.needs, f"attack={self.name} ({type(part).__name__})")
        if training is None:
            return
        training = self.view.training(training)
        most, samples = self.labels.most_samples, training.samples or 1
        if most is not None and samples > most:
            raise UsageError(
                f"attack={self.name} ({type(self.labels).__name__}) reads {most} sample an update, not {samples}; "
                "choose federation.batch_size=1 and federation.local_steps=1, or attack=fedleak"
            )
        # How many steps there were may be assumed, see `assume_one_step`.
        known = training.seen_by(threat)
        self._check_scale(known if known.steps is not None else replace(known, local_steps=1, epochs=1))

    def check_model(self, knowledge: Knowledge, training: LocalTraining) -> None:
        """Raise `UsageError` if the model cannot feed the attack, which else is found only when there are updates.

        Args:
            knowledge: as the attack will get it.
            training: how clients train, all of it.
        """
        training = self.view.training(training)
        if self.inversion.needs_labels and isinstance(self.labels, Joint):
            raise UsageError(
                f"attack={self.name} ({type(self.inversion).__name__}) needs labels; choose another attack/labels than "
                "joint"
            )
        self.labels.check_model(knowledge)
        self.inversion.check_model(knowledge, training)

    def _check_scale(self, training: LocalTraining) -> None:
        if training.scale is not None or not self.inversion.needs_scale:
            return
        if training.optimizer is not None and self.inversion.simulates:
            return
        if training.optimizer is None:
            raise UsageError(
                f"attack={self.name} needs the learning rate to turn new weights into a gradient; grant it with "
                "threat.hyperparameters=true (lr=… of an Eavesdropper), or choose federation.payload=gradient or "
                "attack/inversion=none"
            )
        raise UsageError(
            f"attack={self.name} needs the gradient, which new weights do not tell after "
            f"{type(training.optimizer).__name__}; choose federation.payload=gradient or attack/inversion=none"
        )

    def __call__(
        self,
        observations: Sequence[Observation],
        knowledge: Knowledge,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        seconds: float | None = None,
        store: ReconstructionStore | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> list[Reconstruction]:
        """Attack all observations in one call.

        Args:
            observations: N observations, wherever they are. Unusable ones (`Observation.error`) are reported, not
                attacked.
            knowledge: what else the attacker holds.
            device: where to compute.
            seed: decides every random choice.
            seconds: how long the inversion may take, about; None for as long as it needs.
            store: where each reconstruction is written as it finishes; those already there are not computed again.
            on_progress: called now and then.

        Returns:
            A reconstruction for each observation that `view` shows, in order; all N without a view. Unusable ones come
            with no images and their error as stop reason.

        Raises:
            UsageError: the attack needs what the threat model withholds, or cannot work on these observations.
        """
        self.check(knowledge.threat)
        observations, knowledge = at_hand(observations, knowledge)
        knowledge = seen_through(knowledge, self.adaptive)
        seen = [too_large(observation, knowledge) for observation in self.view(observations)]
        results: list[Reconstruction | None] = [
            _unusable(o, knowledge) if o.error is not None else store.load(o.round, o.client) if store else None
            for o in seen
        ]
        todo = [i for i, result in enumerate(results) if result is None]
        pending, assumed = assume_one_step([seen[i] for i in todo])
        for observation in pending:
            self._check_scale(observation.training)
        start = time.perf_counter()
        share = 0.0

        def keep(index: int, result: Reconstruction) -> None:
            result.seconds += share
            if assumed[index]:
                result.details["assumed"] = "one local step"
            results[todo[index]] = result
            if store is not None:
                store.write(result)

        if pending:
            run = Run(device, seed, seconds, keep, on_progress)
            candidates = max(self.candidates, self.inversion.label_candidates)
            guesses, refused = _infer(self.labels, pending, knowledge, run, candidates)
            for index, why in refused.items():
                results[todo[index]] = _unusable(replace(pending[index], error=why), knowledge)
            if refused:
                log.warning(
                    "%d of %d updates are not attacked: %s", len(refused), len(pending), next(iter(refused.values()))
                )
                left = [i for i in range(len(pending)) if i not in refused]
                todo, assumed = [todo[i] for i in left], [assumed[i] for i in left]
                pending = [pending[i] for i in left]
            share = (time.perf_counter() - start) / len(pending)
            self.inversion.invert(pending, guesses, knowledge, run)
        missing = [seen[i] for i in todo if results[i] is None]
        if missing:
            where = f"round {missing[0].round}, client {missing[0].client}"
            raise RuntimeError(f"{type(self.inversion).__name__} gave no result for {where}")
        return [result for result in results if result is not None]


def _infer(
    labels: LabelInference, pending: Sequence[Observation], knowledge: Knowledge, run: Run, candidates: int
) -> tuple[list[LabelGuess | None], dict[int, str]]:
    """The label guesses of those updates that tell anything, in order, and why the others do not, by index.

    Raises:
        FedleakError: none tells anything.
    """
    try:
        return labels.infer(pending, knowledge, run, candidates=candidates), {}
    except FedleakError:
        if len(pending) == 1:
            raise
    refused: dict[int, str] = {}  # one client's update must not stop the attack on the others
    for index, observation in enumerate(pending):
        try:
            labels.infer([observation], knowledge, run, candidates=candidates)
        except FedleakError as error:
            refused[index] = printable(error)
            if len(refused) == len(pending):
                raise
    rest = [o for index, o in enumerate(pending) if index not in refused]
    return labels.infer(rest, knowledge, run, candidates=candidates), refused


def at_hand(observations: Sequence[Observation], knowledge: Knowledge) -> tuple[list[Observation], Knowledge]:
    """Both as they are on the CPU, where every part of an attack begins; what is there already is not copied.

    What observations share, such as the model that a round sent, they share afterwards too.
    """
    moved: dict[int, dict[str, Tensor]] = {}

    def here(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if all(value.device.type == "cpu" for value in tensors.values()):
            return tensors
        return moved.setdefault(id(tensors), {name: value.cpu() for name, value in tensors.items()})

    found = []
    for o in observations:
        held = {name: getattr(o, name) for name in ("parameters", "update", "start_buffers", "buffers")}
        labels = None if o.labels is None else o.labels.cpu()
        changed: dict[str, Any] = {name: new for name, old in held.items() if (new := here(old)) is not old}
        found.append(replace(o, **changed, labels=labels) if changed or labels is not o.labels else o)
    model, auxiliary = knowledge.model, knowledge.auxiliary
    if any(value.device.type not in ("cpu", "meta") for value in itertools.chain(model.parameters(), model.buffers())):
        model = copy.deepcopy(model).to("cpu")  # the caller's own stays where it is
    if auxiliary is not None:
        auxiliary = (auxiliary[0].cpu(), auxiliary[1].cpu())
    return found, replace(knowledge, model=model, auxiliary=auxiliary)


MOST_BYTES = 4 * 2**30
"""Of the images behind one update; what claims more is not attacked, because memory would not hold the attack."""
MOST_STEPS = 100_000
"""Of one client in one round."""


def too_large(observation: Observation, knowledge: Knowledge) -> Observation:
    """The observation, as unusable where it claims more samples or steps than can be attacked."""
    training = observation.training
    size, steps = training.samples or training.batch_size or 0, training.steps or 0
    if observation.error is None and (size * math.prod(knowledge.image_shape) * 4 > MOST_BYTES or steps > MOST_STEPS):
        return replace(observation, error=f"claims {size} samples in {steps} local steps, too many to attack")
    return observation


def assume_one_step(observations: Sequence[Observation]) -> tuple[list[Observation], list[bool]]:
    """Observations whose number of local steps is withheld as if it were one, and which they are; a warning says so."""
    assumed = [o.training.steps is None for o in observations]
    if any(assumed):
        log.warning(
            "%d of %d updates: the number of local steps is withheld, one is assumed; grant it with "
            "threat.hyperparameters=true (local_steps=… of an Eavesdropper)",
            sum(assumed),
            len(assumed),
        )
    filled = [
        replace(o, training=replace(o.training, local_steps=1, epochs=1)) if unknown else o
        for o, unknown in zip(observations, assumed, strict=True)
    ]
    return filled, assumed


def _unusable(observation: Observation, knowledge: Knowledge) -> Reconstruction:
    labels = torch.empty(0, dtype=torch.int64)
    return _without_search(observation, torch.empty(0, *knowledge.image_shape), labels, observation.error or "unusable")


def _without_search(observation: Observation, images: torch.Tensor, labels: torch.Tensor, why: str) -> Reconstruction:
    return Reconstruction(
        round=observation.round,
        client=observation.client,
        images=images,
        labels=labels,
        objective=float("nan"),
        evaluations=0,
        seconds=0.0,
        stop_reason=why,
        restarts=0,
    )
