"""The tutorials' CNN by batch size, training and activation: reached beside possible, and a control of noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fedleak.attacks import Attack
from fedleak.attacks.inversion.map.attack import image_prior
from fedleak.config import list_of, whole
from fedleak.data import ImageData, to_float
from fedleak.defenses import NoDefense
from fedleak.errors import UsageError
from fedleak.evaluation.intervals import of_median, wilson
from fedleak.evaluation.limits import limit_of
from fedleak.evaluation.matching import match
from fedleak.federation.scenario import AUXILIARY_IMAGES, load_data
from fedleak.instantiate import Part
from fedleak.models import build_model
from fedleak.models.parts import ACTIVATIONS
from fedleak.outcome import write_csv
from fedleak.seeding import generator
from fedleak.studies.base import Job, Study, require
from fedleak.studies.captured import Captured
from fedleak.studies.federations import cell_attack
from fedleak.studies.fresh import draw_victims
from fedleak.studies.limit import CONTROL, noise_like
from fedleak.studies.summaries import by_group
from fedleak.threat import ThreatModel

SHARES = (1e-2, 1e-3)
"""Errors of which the table has the share of images below."""
_TRAINED_AT, _BATCH, _TESTED = 0.05, 32, 2000
"""Learning rate and batch size of training before the attack, and images that its accuracy is measured on."""


@dataclass(frozen=True)
class Cell:
    """One kind of victim, as the table names it."""

    activation: str
    steps: int
    batch_size: int
    update: str = "gradient"


@dataclass
class ReluStudy(Study):
    """Each attack on fresh networks of every kind, one setting changed at a time, and on noise.

    Args:
        networks: of each cell of single images.
        attacks: name -> overrides.
        activations: of untrained networks, one image each; the first is that of all other cells.
        steps: training steps before the attack, one image each.
        batch_sizes: above 1, of untrained networks.
        batch_networks: of each of these, which take longer; None for as many as of the others.
    """

    networks: int
    attacks: Mapping[str, Sequence[str]]
    activations: Sequence[str] = ("relu", "leaky_relu", "sigmoid", "tanh")
    steps: Sequence[int] = (200,)
    batch_sizes: Sequence[int] = (2,)
    batch_networks: int | None = None

    def __post_init__(self) -> None:
        require("networks", self.networks, whole(1))
        if self.batch_networks is not None:
            require("batch_networks", self.batch_networks, whole(1))
        require("steps", self.steps, list_of(1))
        require("batch_sizes", self.batch_sizes, list_of(2))
        unknown = [name for name in self.activations if name not in ACTIVATIONS]
        if unknown or not self.activations:
            raise UsageError(f"study.activations={list(self.activations)}: choose from {', '.join(ACTIVATIONS)}")

    def check(self, job: Job) -> None:
        """The data and the attacks are there, and the model takes the images and the activations."""
        data = load_data(job.setup.data)
        for activation in self.activations:
            build_model(_with(job.setup.model, activation), data.image_shape, data.classes, 0)
        for name in self.attacks:
            self._attack(job, name, 1)

    def cells(self) -> Iterator[Cell]:
        """Every kind of victim, the control last."""
        usual = self.activations[0]
        yield from (Cell(activation, 0, 1) for activation in self.activations)
        yield from (Cell(usual, steps, 1) for steps in self.steps)
        yield from (Cell(usual, 0, size) for size in self.batch_sizes)
        yield Cell(usual, 0, 1, CONTROL)

    def run(self, job: Job) -> pd.DataFrame:
        """Attack every cell, a row an image in ``results.csv``; then ``summary.csv`` and ``relu.png``."""
        data, results, cells = load_data(job.setup.data), job.results(), list(self.cells())
        auxiliary = _auxiliary(data, job.seed)  # the same tensors throughout, of which a prior is made once
        shown: dict[tuple[Cell, str], tuple[Tensor, Tensor]] = {}
        where = [(number, cell) for number in range(self.networks) for cell in cells if number < self._networks(cell)]
        with job.console.steps("attacks", len(where) * len(self.attacks)) as advance:
            for number, cell in where:  # network by network, so that every cell has its rows when a study is stopped
                left = list(self.attacks)
                if number > 0:  # the first network is drawn
                    left = [a for a in left if not results.take(**vars(cell), attack=a, network=number)]
                    advance(len(self.attacks) - len(left), "taken from the earlier run")
                if not left:
                    continue
                victim, accuracy = self._victim(job, data, cell, number)
                possible = self._possible(victim, cell, auxiliary)
                for name in left:
                    rows, pair = self._attacked(job, auxiliary, victim, cell, name, possible)
                    results.add({**row, "network": number, "accuracy": _short(accuracy)} for row in rows)
                    shown.setdefault((cell, name), pair)
                    advance(1, f"{name}: {cell.activation}, {cell.steps} steps, batch size {cell.batch_size}")
        summary = summarise(results.frame)
        write_csv(summary, job.folder / "summary.csv")
        draw(summary, shown, job)
        return summary

    def _attack(self, job: Job, name: str, batch_size: int) -> tuple[Attack, ThreatModel]:
        overrides = [*self.attacks[name], f"federation.batch_size={batch_size}", "federation=fedsgd"]
        attack, setup = cell_attack(job, f"study.attacks.{name}", overrides)
        return attack, setup.threat

    def _networks(self, cell: Cell) -> int:
        return (cell.batch_size > 1 and self.batch_networks) or self.networks

    def _victim(self, job: Job, data: ImageData, cell: Cell, number: int) -> tuple[Captured, float]:
        """A network's update, the truth behind it, and how accurate the network is on test images."""
        accuracies = list[float]()

        def train(network: nn.Module, number: int) -> None:
            train_steps(network, data, cell.steps, generator(job.seed, "relu", "train", number))
            accuracies.append(_accuracy(network, data))

        model = _with(job.setup.model, cell.activation)
        victim = draw_victims(data, model, [number], cell.batch_size, ThreatModel(), job.seed, train)
        if cell.update == CONTROL:
            observation = victim.observations[0]
            noise = noise_like(observation, generator(job.seed, "relu", CONTROL, number))
            victim = replace(victim, observations=[replace(observation, update=noise)])
        return victim, accuracies[0]

    def _possible(self, victim: Captured, cell: Cell, auxiliary: tuple[Tensor, Tensor]) -> list[float] | None:
        """The limit of one image with the attacker's prior of auxiliary images; larger batches are left out."""
        if cell.update == CONTROL or cell.batch_size > 1:
            return None
        observation, truth = victim.observations[0], victim.truths[0]
        knowledge = replace(victim.knowledge, auxiliary=auxiliary)
        prior = image_prior(knowledge)
        found = limit_of(observation, truth, knowledge, observation.training, NoDefense(), prior)
        return [float(value) for value in found.mse]

    def _attacked(
        self,
        job: Job,
        auxiliary: tuple[Tensor, Tensor],
        victim: Captured,
        cell: Cell,
        name: str,
        possible: list[float] | None,
    ) -> tuple[list[dict[str, Any]], tuple[Tensor, Tensor]]:
        attack, threat = self._attack(job, name, cell.batch_size)
        knowledge = replace(victim.knowledge, threat=threat)
        if threat.auxiliary_data:
            knowledge = replace(knowledge, auxiliary=auxiliary)
        found = attack(victim.observations, knowledge, device=job.device, seed=job.seed)[0]
        pairs = match(found, victim.truths[0], similarity=False)
        where = {"update": cell.update, "activation": cell.activation, "steps": cell.steps}
        rows = [
            {**where, "batch_size": cell.batch_size, "attack": name, "image": pair.image}
            | {"mse": _short(pair.mse), "limit_mse": _short(possible[place] if possible else None)}
            | {"method": found.details.get("method"), "stop_reason": str(found.stop_reason)}
            | {"evaluations": found.evaluations, "seconds": round(found.seconds, 2)}
            for place, pair in enumerate(pairs)
        ]
        first = pairs[0]
        assert first.true is not None
        return rows, (first.true, first.rebuilt if first.rebuilt is not None else torch.full_like(first.true, 0.5))


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a cell and attack: medians and shares with 95% intervals, and the limit."""

    def row(group: pd.DataFrame) -> dict[str, Any]:
        mse = pd.to_numeric(group["mse"], errors="coerce")
        low, high = of_median(mse)
        values = {"images": len(group), "mse": mse.median(), "mse_low": low, "mse_high": high}
        for bound in SHARES:
            share = float((mse < bound).mean())
            name = f"below_{bound:g}"
            values |= {name: share} | dict(zip((f"{name}_low", f"{name}_high"), wilson(share, len(group)), strict=True))
        limit = pd.to_numeric(group["limit_mse"], errors="coerce").median()
        return {k: _short(v) for k, v in values.items()} | {
            "limit_mse": _short(limit),
            "accuracy": _short(group["accuracy"].mean()),
            "seconds": _short(group["seconds"].median()),
        }

    return by_group(frame, ["update", "activation", "steps", "batch_size", "attack"], row)


def draw(summary: pd.DataFrame, shown: Mapping[tuple[Cell, str], tuple[Tensor, Tensor]], job: Job) -> None:
    """``relu.png``: a private image of every cell above what each attack rebuilt of it, with medians and limits."""
    cells, attacks = list(dict.fromkeys(cell for cell, _ in shown)), list(dict.fromkeys(name for _, name in shown))
    figure = Figure(figsize=(1.7 * len(cells), 1.9 * (len(attacks) + 1)), layout="constrained")
    panels = np.atleast_2d(figure.subplots(len(attacks) + 1, len(cells), squeeze=False))
    keys = summary[["update", "activation", "steps", "batch_size", "attack"]].itertuples(index=False, name=None)
    table = dict(zip(keys, summary.to_dict("records"), strict=True))
    for column, cell in enumerate(cells):
        rows = [table[cell.update, cell.activation, cell.steps, cell.batch_size, name] for name in attacks]
        pictures = [shown[cell, attacks[0]][0], *(shown[cell, name][1] for name in attacks)]
        for panel, picture in zip(panels[:, column], pictures, strict=True):
            panel.imshow(picture.clamp(0, 1).permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=1)
            panel.set_xticks([])
            panel.set_yticks([])
        title = CONTROL if cell.update == CONTROL else f"{cell.activation}, {cell.steps} steps\nB = {cell.batch_size}"
        panels[0, column].set_title(title, fontsize=8)
        if not pd.isna(rows[0]["limit_mse"]):
            panels[0, column].set_xlabel(f"possible {rows[0]['limit_mse']:.1e}", fontsize=7)
        for panel, row in zip(panels[1:, column], rows, strict=True):
            panel.set_xlabel(f"reached {row['mse']:.1e}", fontsize=7)
    for panel, name in zip(panels[:, 0], ["private", *attacks], strict=True):
        panel.set_ylabel(name.replace("_", " "), fontsize=8)
    figure.suptitle("Median error, and the first network's first image", fontsize=9)
    figure.savefig(job.folder / "relu.png", dpi=110)


def _with(model: Part, activation: str) -> Part:
    return replace(model, node={**model.node, "activation": activation})


def train_steps(network: nn.Module, data: ImageData, steps: int, random: torch.Generator) -> None:
    """SGD with momentum on batches of 32 training images."""
    optimizer = torch.optim.SGD(network.parameters(), lr=_TRAINED_AT, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(len(data.train_labels), (_BATCH,), generator=random)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(to_float(data.train_images[chosen])), data.train_labels[chosen])
        loss.backward()
        optimizer.step()


def _accuracy(network: nn.Module, data: ImageData) -> float:
    with torch.no_grad():
        guesses = network(to_float(data.test_images[:_TESTED])).argmax(1)
    return float((guesses == data.test_labels[:_TESTED]).double().mean())


def _auxiliary(data: ImageData, seed: int) -> tuple[Tensor, Tensor]:
    """Test images, which are no client's."""
    order = torch.randperm(len(data.test_labels), generator=generator(seed, "auxiliary"))[:AUXILIARY_IMAGES]
    return to_float(data.test_images[order]), data.test_labels[order]


def _short(value: float | None) -> float | None:
    return None if value is None or pd.isna(value) else float(f"{float(value):.4g}")
