"""What finished federations captured, attacked as a study likes and judged: rows of labels, rows of images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fedleak.attacks import Attack, Knowledge, LabelInference, Progress, Run
from fedleak.attacks.attack import assume_one_step
from fedleak.capture import CaptureStore, Observation
from fedleak.config import Rule, check
from fedleak.errors import UsageError
from fedleak.evaluation.intervals import normal, of_median, wilson
from fedleak.evaluation.metrics import label_accuracy, labels_exact
from fedleak.evaluation.scores import Match, match
from fedleak.pipeline import attacker_knowledge, build_attack, check_attack
from fedleak.studies.base import Job, require
from fedleak.studies.federations import Cells, cell_config, check_cells
from fedleak.studies.labels import load_method
from fedleak.threat import ThreatModel
from fedleak.truth import Truth, TruthStore

NAMES = Rule(
    lambda v: isinstance(v, list) and len(v) > 0 and all(isinstance(x, str) for x in v), "a list of names, not empty"
)


@dataclass(frozen=True)
class Captured:
    """Some updates of a finished federation, and what is behind them, which only the judgement reads.

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


def load_captured(config: Mapping[str, Any], run_dir: Path) -> Captured:
    """All usable updates that a federation's server kept, by round and client."""
    threat = ThreatModel(**config["threat"])
    store, kept = CaptureStore.open(run_dir / "captures"), TruthStore(run_dir / "truth")
    observations, truths = [], []
    for observation in store.load(threat=threat):
        truth = kept.load(observation.round, observation.client)
        if observation.error is None and truth is not None:
            observations.append(observation)
            truths.append(truth)
    return Captured(attacker_knowledge(config, store, threat), observations, truths)


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
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Match]:
    """A pair of private and rebuilt image for each private image, in the order of the updates."""
    found = attack(captured.observations, captured.knowledge, device=device, seed=seed, on_progress=on_progress)
    return [pair for one, truth in zip(found, captured.truths, strict=True) for pair in match(one, truth)]


def label_summary(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """A row a group of `attack_labels`' rows: mean label accuracy and whole-batch rate with 95% intervals over updates.

    Updates count as independent, those of one federation too.
    """
    rows = []
    for key, group in frame.groupby(list(keys), sort=False):
        low, high = normal(group["label_accuracy"])
        exact = float(group["labels_exact"].mean())
        exact_low, exact_high = wilson(exact, len(group))
        rows.append(
            dict(zip(keys, key, strict=True))
            | {"updates": len(group), "label_accuracy": group["label_accuracy"].mean()}
            | {"low": max(0.0, low), "high": min(1.0, high)}
            | {"labels_exact": exact, "exact_low": exact_low, "exact_high": exact_high}
        )
    return pd.DataFrame(rows).round(4)


def image_summary(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """A row a group of rows of `leakage.csv`'s form: the share recovered and the medians of MSE, PSNR and SSIM.

    95% intervals over images, which count as independent, those of one batch too.
    """
    rows = []
    for key, group in frame.groupby(list(keys), sort=False):
        recovered = float(group["recovered"].astype(float).mean())
        low, high = wilson(recovered, len(group))
        psnr_low, psnr_high = of_median(group["psnr"])
        rows.append(
            dict(zip(keys, key, strict=True))
            | {"images": len(group), "recovered": round(recovered, 4), "low": round(low, 4), "high": round(high, 4)}
            | {"mse": float(f"{group['mse'].median():.4g}"), "psnr": round(group["psnr"].median(), 2)}
            | {"psnr_low": round(psnr_low, 2), "psnr_high": round(psnr_high, 2)}
            | {"ssim": round(group["ssim"].median(), 4)}
        )
    return pd.DataFrame(rows)


def load_methods(names: Sequence[str]) -> dict[str, LabelInference]:
    """The choices `names` of ``attack/labels``; raises `UsageError` where ``study.methods`` names none."""
    require("methods", names, NAMES)
    return {name: load_method(name, "study.methods") for name in names}


def without_attack(job: Job) -> Job:
    """The job of federations that are attacked after they ran: nothing typed about an attack concerns them."""
    kept = [override for override in job.overrides if not override.lstrip("+~").startswith("attack")]
    return replace(job, overrides=[*kept, "attack=none"])


def check_federations(job: Job, cells: Cells, methods: Mapping[str, LabelInference]) -> None:
    """Raise `UsageError` for a federation that is refused, or that the attack or a method cannot be used on."""
    check(job.config)
    attack = build_attack(job.config)
    if attack is None:
        raise UsageError("attack=none: the study attacks images; choose an attack, see fedleak list")
    check_cells(without_attack(job), cells)
    for changes in cells.values():
        config = cell_config(without_attack(job), changes)
        check_attack(attack, config)
        check_methods(methods, config)


def check_methods(methods: Mapping[str, LabelInference], config: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a method that needs what is not granted, or takes fewer samples than an update holds."""
    samples = config["federation"]["batch_size"] * config["federation"]["local_steps"]
    for name, method in methods.items():
        ThreatModel(**config["threat"]).require(method.needs, f"study.methods={name}")
        if method.most_samples is not None and samples > method.most_samples:
            raise UsageError(
                f"study.methods={name}: reads {method.most_samples} sample an update, not {samples}; leave it out"
            )
