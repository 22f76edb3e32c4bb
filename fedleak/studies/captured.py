"""What finished federations captured, attacked as a study likes and judged: rows of labels, rows of images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedleak.attacks import Attack, Knowledge, LabelInference, Progress, Run
from fedleak.attacks.attack import assume_one_step
from fedleak.attacks.store import ReconstructionStore
from fedleak.capture import CaptureStore, Observation
from fedleak.errors import UsageError
from fedleak.evaluation.judge import truth_behind
from fedleak.evaluation.matching import Match, match
from fedleak.evaluation.metrics import label_accuracy, labels_exact
from fedleak.outcome import Outcome
from fedleak.pipeline import attacker_knowledge
from fedleak.setup import Setup
from fedleak.studies.base import Job
from fedleak.studies.federations import Cells, cell_setup, check_cells, run_cells
from fedleak.truth import Truth, TruthStore


@dataclass(frozen=True)
class Captured:
    """Some updates, and what is behind them, which only the judgement reads.

    Attributes:
        knowledge: what the attacker holds besides its observations.
        observations: N updates.
        truths: N private batches, in the same order.
    """

    knowledge: Knowledge
    observations: list[Observation]
    truths: list[Truth]

    def some(self, rounds: Collection[int], clients: int) -> Captured:
        """Those of the given rounds, and of each the first `clients` by number."""
        taken: dict[int, int] = {}
        chosen = []
        for index, observation in enumerate(self.observations):
            number = observation.round
            if number in rounds and taken.get(number, 0) < clients:
                taken[number] = taken.get(number, 0) + 1
                chosen.append(index)
        return replace(
            self, observations=[self.observations[i] for i in chosen], truths=[self.truths[i] for i in chosen]
        )


def load_captured(setup: Setup, run_dir: Path) -> Captured:
    """All usable updates that a federation's server kept, by round and client."""
    store, kept = CaptureStore.open(run_dir / "captures"), TruthStore(run_dir / "truth")
    observations, truths = [], []
    for observation in store.load(threat=setup.threat):
        truth = kept.load(observation.round, observation.client)
        if observation.error is None and truth is not None:
            observations.append(observation)
            truths.append(truth)
    return Captured(attacker_knowledge(setup, store), observations, truths)


@dataclass(frozen=True)
class Attacked:
    """A finished federation of a study, and what leaked.

    Attributes:
        name: its cell's.
        outcome: of the federation.
        captured: all its updates.
        labels: rows of `attack_labels`, of all updates.
        matches: pairs of images, of the victims.
    """

    name: str
    outcome: Outcome
    captured: Captured
    labels: list[dict[str, Any]]
    matches: list[Match]


def run_and_attack(
    job: Job, cells: Cells, methods: Mapping[str, LabelInference], moments: Mapping[str, Collection[int]], clients: int
) -> Iterator[Attacked]:
    """Run the federations one after the other, and attack each as it finishes.

    Args:
        job: the study's, whose attack rebuilds the images.
        cells: the federations; each seed is the cell's own.
        methods: label inferences, which read every captured update.
        moments: cell -> the rounds in which images are attacked.
        clients: victims of each moment.
    """
    attack, blind = job.setup.attack.build(), without_attack(job)
    assert attack is not None  # checked before
    for name, outcome in run_cells(blind, cells):
        setup = cell_setup(blind, cells[name])
        captured = load_captured(setup, outcome.folder)
        labels = attack_labels(captured, methods, setup.seed)
        victims, matches = captured.some(moments[name], clients), []
        if victims.observations:
            with job.console.attack(attack.name, len(victims.observations)) as on_progress:
                kept = ReconstructionStore(outcome.folder / "victims")
                how: dict[str, Any] = {"device": job.device, "seed": setup.seed, "on_progress": on_progress}
                matches = attack_images(victims, attack, store=kept, **how)
        yield Attacked(name, outcome, captured, labels, matches)


def attack_labels(captured: Captured, methods: Mapping[str, LabelInference], seed: int) -> list[dict[str, Any]]:
    """A row a method and update: round, client, method, label_accuracy, labels_exact."""
    rows = []
    for name, method in methods.items():
        guesses = method.infer(assume_one_step(captured.observations)[0], captured.knowledge, Run(seed=seed))
        for observation, truth, guess in zip(captured.observations, captured.truths, guesses, strict=True):
            inferred = torch.empty(0, dtype=torch.int64) if guess is None else guess.best
            rows.append(
                {"round": observation.round, "client": observation.client, "method": name}
                | {"label_accuracy": label_accuracy(truth.labels, inferred)}
                | {"labels_exact": labels_exact(truth.labels, inferred)}
            )
    return rows


def attack_images(
    captured: Captured,
    attack: Attack,
    *,
    device: torch.device,
    seed: int,
    store: ReconstructionStore | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Match]:
    """A pair of private and rebuilt image for each private image, in the order of the updates that the attack sees."""
    how: dict[str, Any] = {"device": device, "seed": seed, "store": store, "on_progress": on_progress}
    found = attack(captured.observations, captured.knowledge, **how)
    truths = {(truth.round, truth.client): truth for truth in captured.truths}
    seen = zip(attack.view(captured.observations), found, strict=True)
    pairs = (match(one, truth_behind(observation, lambda *where: truths.get(where))) for observation, one in seen)
    return [pair for matches in pairs for pair in matches]


def without_attack(job: Job) -> Job:
    """The job of federations that are attacked after they ran: nothing typed about an attack concerns them."""
    kept = [override for override in job.overrides if not override.lstrip("+~").startswith("attack")]
    return replace(job, overrides=[*kept, "attack=none"])


def check_federations(job: Job, cells: Cells, methods: Mapping[str, LabelInference]) -> None:
    """Raise `UsageError` for a federation that is refused, or that the attack or a method cannot be used on."""
    attack = job.setup.attack.build()
    if attack is None:
        raise UsageError("attack=none: the study attacks images; choose an attack, see fedleak list")
    for setup in check_cells(without_attack(job), cells):
        setup.check_attack(attack)
        check_methods(methods, setup)


def check_methods(methods: Mapping[str, LabelInference], setup: Setup) -> None:
    """Raise `UsageError` for a method that needs what is not granted, or takes fewer samples than an update holds."""
    samples = setup.training.samples or 1
    for name, method in methods.items():
        setup.threat.require(method.needs, f"study.methods={name}")
        if method.most_samples is not None and samples > method.most_samples:
            raise UsageError(
                f"study.methods={name}: reads {method.most_samples} sample an update, not {samples}; leave it out"
            )
