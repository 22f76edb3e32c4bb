"""Reached beside possible: what `attack=map` rebuilds through noise and pruning, and the least anyone could reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fedleak.attacks import Attack
from fedleak.attacks.image_prior import ImagePrior
from fedleak.attacks.inversion import MAP
from fedleak.attacks.inversion.map.attack import image_prior
from fedleak.attacks.labels import Known
from fedleak.attacks.results import is_converged
from fedleak.capture import Observation
from fedleak.config import Rule, is_number, list_of, whole
from fedleak.data import to_float
from fedleak.defenses import Defense, Gaussian, NoDefense, Pruning
from fedleak.evaluation.intervals import of_median
from fedleak.evaluation.limits import limit_of
from fedleak.evaluation.matching import match
from fedleak.evaluation.metrics import RECOVERED_MSE
from fedleak.federation.scenario import AUXILIARY_IMAGES, load_data
from fedleak.models import build_model
from fedleak.outcome import write_csv
from fedleak.seeding import generator
from fedleak.studies.base import Job, Study, require
from fedleak.studies.captured import Captured
from fedleak.studies.fresh import draw_victims
from fedleak.studies.summaries import by_group
from fedleak.threat import ThreatModel

_NUMBERS = Rule(lambda v: isinstance(v, list) and all(is_number(x) and x >= 0 for x in v), "a list of numbers from 0")
CONTROL = "control"
"""An update of noise with the gradient's own norms: there is nothing in it to find."""


@dataclass
class LimitStudy(Study):
    """Fresh networks, labels known, 1,024 auxiliary images granted; the noise is not granted.

    Args:
        networks: of each cell.
        batch_sizes: samples of a private batch.
        noise: standard deviations of Gaussian noise; 0 is none.
        pruning: shares of every tensor that are zeroed, each below 1.
    """

    networks: int
    batch_sizes: Sequence[int] = (1,)
    noise: Sequence[float] = (0.0, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    pruning: Sequence[float] = (0.5, 0.9, 0.99)

    def __post_init__(self) -> None:
        require("networks", self.networks, whole(1))
        require("batch_sizes", self.batch_sizes, list_of(1))
        require("noise", self.noise, _NUMBERS)
        require("pruning", self.pruning, _NUMBERS)

    def check(self, job: Job) -> None:
        """The data are there, and the model takes them."""
        data = load_data(job.setup.data)
        build_model(job.setup.model, data.image_shape, data.classes, 0)
        for defense, strength in self._defenses():
            _defense(defense, strength)

    def run(self, job: Job) -> pd.DataFrame:
        """Attack every cell, a row an image in ``results.csv``; then ``summary.csv`` and ``limit.png``."""
        data, results = load_data(job.setup.data), job.results()
        threat = ThreatModel(auxiliary_data=True, labels=True)
        cells = [(b, *d) for b in self.batch_sizes for d in self._defenses()]
        shown: dict[tuple[int, str, float], tuple[Tensor, Tensor]] = {}
        with job.console.steps("networks", len(cells) * self.networks) as advance:
            for batch_size, defense, strength in cells:
                victims = draw_victims(data, job.setup.model, range(self.networks), batch_size, threat, job.seed)
                chosen = torch.randperm(len(data.test_labels), generator=generator(job.seed, "auxiliary"))
                own = chosen[:AUXILIARY_IMAGES]
                auxiliary = to_float(data.test_images[own]), data.test_labels[own]
                knowledge = replace(victims.knowledge, auxiliary=_once(auxiliary, job))
                victims = replace(victims, knowledge=knowledge)
                prior = image_prior(knowledge)
                for number in range(self.networks):
                    where = {"batch_size": batch_size, "network": number, "defense": defense, "strength": strength}
                    if number > 0 and results.take(**where):  # the first one is drawn
                        advance(1, "taken from the earlier run")
                        continue
                    rows, pair = self._attacked(victims, number, defense, strength, prior, job)
                    results.add({"batch_size": batch_size, "network": number, **row} for row in rows)
                    shown.setdefault((batch_size, defense, strength), pair)
                    advance(1, f"{defense} {strength:g}, batch size {batch_size}")
        summary = summarise(results.frame)
        write_csv(summary, job.folder / "summary.csv")
        draw(summary, shown, job)
        return summary

    def _defenses(self) -> list[tuple[str, float]]:
        return [*(("noise", s) for s in self.noise), *(("pruning", r) for r in self.pruning), (CONTROL, 1.0)]

    def _attacked(
        self, victims: Captured, number: int, defense: str, strength: float, prior: ImagePrior, job: Job
    ) -> tuple[list[dict[str, Any]], tuple[Tensor, Tensor]]:
        observation, truth = victims.observations[number], victims.truths[number]
        random = generator(job.seed, "limit", defense, str(strength), len(truth.labels), number)
        applied = _defense(defense, strength)
        sent = dict(observation.update) if defense != CONTROL else noise_like(observation, random)
        labels = truth.labels.sort().values
        observation = replace(observation, update=applied.apply(sent, generator=random), labels=labels)
        attack = Attack(Known(), MAP(), name="map")
        found = attack([observation], victims.knowledge, device=job.device, seed=job.seed)[0]
        possible = None
        if defense != CONTROL:
            possible = limit_of(observation, truth, victims.knowledge, observation.training, applied, prior)
        pairs = match(found, truth, similarity=False, limit_mse=possible.mse if possible else None)
        rows = [
            {
                "defense": defense,
                "strength": strength,
                "image": pair.image,
                "mse": _short(pair.mse),
                "limit_mse": _short(pair.limit_mse),
                "expected_mse": _short(pair.expected_mse),
                "limit_bits": _short(possible.bits if possible else None),
                "recovered": pair.recovered,
                "stop_reason": str(found.stop_reason),
                "evaluations": found.evaluations,
                "seconds": round(found.seconds, 3),
            }
            for pair in pairs
        ]
        first = pairs[0]
        assert first.true is not None
        return rows, (first.true, first.rebuilt if first.rebuilt is not None else torch.full_like(first.true, 0.5))


def _once(auxiliary: tuple[Tensor, Tensor], job: Job) -> tuple[Tensor, Tensor]:
    """The same tensors for every cell of a study, so that their prior is made once."""
    if job.folder not in _AUXILIARY:
        _AUXILIARY.clear()
        _AUXILIARY[job.folder] = auxiliary
    return _AUXILIARY[job.folder]


_AUXILIARY: dict[object, tuple[Tensor, Tensor]] = {}


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a cell: medians with 95% intervals, what was reached over what was possible, and over what was expected."""

    def row(cell: pd.DataFrame) -> dict[str, Any]:
        numbers = {name: pd.to_numeric(cell[name], errors="coerce") for name in ("mse", "limit_mse", "expected_mse")}
        ratio, honest = numbers["mse"] / numbers["limit_mse"], numbers["mse"] / numbers["expected_mse"]
        low, high = of_median(numbers["mse"])
        return {
            "images": len(cell),
            "recovered": round(float(cell["recovered"].astype(float).mean()), 4),
            "mse": _short(numbers["mse"].median()),
            "mse_low": _short(low),
            "mse_high": _short(high),
            "limit_mse": _short(numbers["limit_mse"].median()),
            "reached_over_possible": _short(ratio.median()),
            "true_over_expected": _short(honest.median()),
            "converged": round(float(cell["stop_reason"].map(is_converged).mean()), 4),
            "seconds": _short(cell["seconds"].median()),
        }

    return by_group(frame, ["batch_size", "defense", "strength"], row)


def draw(summary: pd.DataFrame, shown: Mapping[tuple[int, str, float], tuple[Tensor, Tensor]], job: Job) -> None:
    """``limit.png``: a private image beside what was rebuilt, under every defense, with reached and possible."""
    sizes = list(dict.fromkeys(key[0] for key in shown))
    columns = [key[1:] for key in shown if key[0] == sizes[0]]
    figure = Figure(figsize=(1.5 * len(columns), 3.4 * len(sizes)), layout="constrained")
    panels = figure.subplots(2 * len(sizes), len(columns), squeeze=False)
    keys = summary[["batch_size", "defense", "strength"]].itertuples(index=False, name=None)
    table = dict(zip(keys, summary.to_dict("records"), strict=True))
    for line, size in enumerate(sizes):
        for column, (defense, strength) in enumerate(columns):
            values = table[size, defense, strength]
            for place, picture in enumerate(shown[size, defense, strength]):
                panel = panels[2 * line + place, column]
                panel.imshow(picture.clamp(0, 1).permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=1)
                panel.set_xticks([])
                panel.set_yticks([])
            name = defense if defense == CONTROL else f"{defense} {strength:g}"
            panels[2 * line, column].set_title(name, fontsize=8)
            text = f"error {values['mse']:.1e}"
            if not pd.isna(values["limit_mse"]):
                text = f"reached {values['mse']:.1e}\npossible {values['limit_mse']:.1e}"
            panels[2 * line + 1, column].set_xlabel(text, fontsize=7)
        panels[2 * line, 0].set_ylabel(f"private, B = {size}", fontsize=8)
        panels[2 * line + 1, 0].set_ylabel("rebuilt", fontsize=8)
    figure.suptitle(
        f"Median error over {_images(summary)} images a cell; recovered below {RECOVERED_MSE:g}", fontsize=9
    )
    figure.savefig(job.folder / "limit.png", dpi=110)


def _images(summary: pd.DataFrame) -> str:
    """How many images a cell has, or from how many to how many."""
    low, high = int(summary["images"].min()), int(summary["images"].max())
    return str(low) if low == high else f"{low} to {high}"


def _defense(name: str, strength: float) -> Defense:
    if name == "pruning":
        return Pruning(strength)
    return Gaussian(strength) if name == "noise" and strength > 0 else NoDefense()


def noise_like(observation: Observation, random: torch.Generator) -> dict[str, Tensor]:
    """Noise with the root mean square of every tensor of an update."""
    return {
        name: value.square().mean().sqrt() * torch.randn(value.shape, generator=random)
        for name, value in observation.update.items()
    }


def _short(value: float | None) -> float | None:
    return None if value is None or pd.isna(value) else float(f"{float(value):.4g}")
