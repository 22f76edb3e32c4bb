"""The judgement, which alone opens the ground truth: what came out of an attack, beside what was private."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from fedleak.attacks import Knowledge, Reconstruction
from fedleak.capture import Observation
from fedleak.defenses import Defense
from fedleak.evaluation.limits import limits_of
from fedleak.evaluation.matching import LEAKAGE_COLUMNS, Match, match
from fedleak.evaluation.tables import ATTACK_COLUMNS, score
from fedleak.facts import defense_name
from fedleak.limit import Limit
from fedleak.local_update import local_update
from fedleak.setup import Setup
from fedleak.threads import one_thread
from fedleak.training import LocalTraining
from fedleak.truth import Truth, TruthStore

log = logging.getLogger("fedleak")


@dataclass(frozen=True)
class Attacked:
    """What an attack saw and what it made of it, side by side.

    Attributes:
        observations, reconstructions: N of each.
        knowledge: what else the attacker held.
        where: the folder that the reconstructions are kept in.
    """

    observations: list[Observation]
    reconstructions: list[Reconstruction]
    knowledge: Knowledge
    where: Path


@dataclass(frozen=True)
class Judgement:
    """What leaked; nothing, where nothing was attacked.

    Attributes:
        attacks, leakage: ``attacks.csv``, a row an update, and ``leakage.csv``, a row a private image.
        matches: the pairs of images behind the latter.
        reconstructions: the folder that they are kept in.
    """

    attacks: pd.DataFrame = field(default_factory=partial(pd.DataFrame, columns=list(ATTACK_COLUMNS)))
    leakage: pd.DataFrame = field(default_factory=partial(pd.DataFrame, columns=list(LEAKAGE_COLUMNS)))
    matches: list[Match] = field(default_factory=list)
    reconstructions: Path | None = None


def judge(attacked: Attacked, truths: TruthStore, setup: Setup) -> Judgement:
    """Join every reconstruction with its ground truth, where there is one, and repeat the client's training on it."""
    attacks, leakage, matches = [], [], []
    behind = [truth_behind(observation, truths.load) for observation in attacked.observations]
    missing = sum(truth is None for truth in behind)
    if missing:
        log.warning(
            "the truth of %d of %d updates is not there: their images and labels are not judged", missing, len(behind)
        )
    limits: dict[int, Limit] = {}
    if setup.limit == "auto":
        defense = setup.defense.build(Defense)
        limits = limits_of(attacked.observations, behind, attacked.knowledge, setup.seen_in(1), defense)
    pairs = zip(attacked.observations, attacked.reconstructions, behind, strict=True)
    for index, (observation, reconstruction, truth) in enumerate(pairs):
        possible = limits.get(index)
        found = match(reconstruction, truth, limit_mse=possible.mse if possible else None)
        row, images = score(
            reconstruction,
            truth,
            matches=found,
            attack=setup.attack.name,
            defense=defense_name(setup.defense),
            batch_size=observation.training.batch_size,
            limit_bits=possible.bits if possible else None,
            update_residual=update_residual(
                attacked.knowledge.model, observation, truth, setup.seen_in(observation.round)
            ),
        )
        attacks.append(row)
        leakage += images
        matches += found
    return Judgement(
        pd.DataFrame(attacks, columns=list(ATTACK_COLUMNS)),
        pd.DataFrame(leakage, columns=list(LEAKAGE_COLUMNS)),
        matches,
        attacked.where,
    )


def truth_behind(observation: Observation, load: Callable[[int, int], Truth | None]) -> Truth | None:
    """What is behind an observation: its client's private batches, or those of all whose updates it sums up.

    Args:
        observation: what the attacker saw.
        load: round and client -> one client's truth, None where there is none.
    """
    found = [load(observation.round, client) for client in observation.clients or (observation.client,)]
    known = [truth for truth in found if truth is not None]
    if len(known) < len(found):
        return None
    if len(known) == 1:
        return known[0]
    steps = known[0].local_steps
    images, labels = (
        torch.cat([part for parts in zip(*(values.chunk(steps) for values in each), strict=True) for part in parts])
        for each in ([truth.images for truth in known], [truth.labels for truth in known])
    )
    return Truth(observation.round, observation.client, images, labels, steps)


def update_residual(
    model: nn.Module, observation: Observation, truth: Truth | None, training: LocalTraining
) -> float | None:
    """The self-check: relative ℓ2 distance between the captured update and the one recomputed from the truth.

    About 1e-7 if client and attacker agree on preprocessing, mode, learning rate and steps; more with a defense.
    None if it cannot be recomputed (an unusable update, no truth, or one of other shapes).
    """
    if truth is None or observation.error is not None:
        return None
    try:
        with one_thread():  # as the clients ran, so that rounding does not look like a disagreement
            again = local_update(
                model,
                observation.parameters,
                observation.start_buffers,
                truth.images,
                truth.labels,
                replace(training, local_steps=truth.local_steps),
            ).update
    except (RuntimeError, ValueError, IndexError):
        return None
    origin = observation.parameters if training.payload == "weights" else None

    def change(values: Mapping[str, Tensor], name: str) -> Tensor:
        return (values[name] - origin[name] if origin is not None else values[name]).double()

    try:
        distance = sum(float((change(observation.update, n) - change(again, n)).square().sum()) for n in again)
    except RuntimeError:  # a truth file with another number of samples
        return None
    size = sum(float(change(again, n).square().sum()) for n in again)
    return float(f"{(distance / size) ** 0.5:.4g}") if size > 0 else None
