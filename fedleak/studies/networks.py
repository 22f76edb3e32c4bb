"""Attacks on networks as people train them: PSNR beside what was published, and the error against steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fedleak.attacks import Attack, Knowledge, Reconstruction
from fedleak.config import Rule, one_of, whole
from fedleak.data import ImageData, to_float
from fedleak.errors import UsageError
from fedleak.evaluation.intervals import student
from fedleak.evaluation.label_study import ONE_STEP, client_update, draw_batch
from fedleak.evaluation.matching import match
from fedleak.federation.scenario import load_data
from fedleak.models import build_model
from fedleak.outcome import write_csv
from fedleak.seeding import derive_seed, generator
from fedleak.setup import Setup
from fedleak.studies.base import Job, Results, Study, require
from fedleak.studies.federations import cell_attack, cell_setup
from fedleak.studies.relu import train_steps
from fedleak.studies.summaries import by_group
from fedleak.truth import Truth

LABELS = ("any", "different", "equal")
_KEYS = ["network", "steps", "mode", "batch_size", "labels", "attack"]
_WHOLE, _FROM_0 = whole(1), whole(0)
_SETTINGS: Mapping[str, Rule] = {
    "steps": _FROM_0,
    "batch_size": _WHOLE,
    "labels": one_of(*LABELS),
    "mode": one_of("eval", "train"),
    "victims": _WHOLE,
}


@dataclass(frozen=True)
class Cell:
    """One kind of victim, as the tables name it.

    Attributes:
        network: of `Networks.networks`.
        steps: of training before the attack.
        batch_size: images behind an update.
        labels: ``any``, ``different``, or ``equal`` ones in a batch.
        mode: of the client's model: ``eval`` or ``train``.
        victims: updates attacked, each of a network and a batch of its own.
    """

    network: str
    steps: int = 0
    batch_size: int = 1
    labels: str = "any"
    mode: str = "eval"
    victims: int = 1

    @property
    def keys(self) -> dict[str, Any]:
        """What tells its rows from others'."""
        return {name: getattr(self, name) for name in _KEYS if name != "attack"}


class Networks(Study):
    """Each attack on fresh networks of every kind: the error and PSNR of every image, and on the way.

    Args:
        networks: name -> overrides that say which model, and of which images.
        cells: each {network, steps, batch_size, labels, mode, victims}, see `Cell`.
        attacks: name -> overrides.
        only: attack -> networks that it is for; all, where it is not named.
        published: ``NETWORK STEPS ATTACK`` -> the published mean PSNR in dB, for the table.
    """

    def __init__(
        self,
        networks: Mapping[str, Sequence[str]],
        cells: Sequence[Mapping[str, Any]],
        attacks: Mapping[str, Sequence[str]],
        only: Mapping[str, Sequence[str]] | None = None,
        published: Mapping[str, float] | None = None,
    ) -> None:
        self.networks, self.attacks = networks, attacks
        self.only, self.published = only or {}, published or {}
        self.cells = [self._cell(number, dict(cell)) for number, cell in enumerate(cells)]
        for name in self.only:
            if name not in attacks:
                raise UsageError(f"study.only.{name}: no such attack here; known: {', '.join(attacks)}")

    def _cell(self, number: int, settings: dict[str, Any]) -> Cell:
        unknown = [name for name in settings if name not in Cell.__dataclass_fields__]
        if unknown or settings.get("network") not in self.networks:
            known = ", ".join(self.networks)
            raise UsageError(
                f"study.cells[{number}]={settings}: takes network (of {known}), {', '.join(_SETTINGS)} and nothing else"
            )
        for name, rule in _SETTINGS.items():
            if name in settings:
                require(f"cells[{number}].{name}", settings[name], rule)
        return Cell(**settings)

    def check(self, job: Job) -> None:
        """The data are there, the models take them, and every attack can be made."""
        for cell in self.cells:
            setup = cell_setup(job, self.networks[cell.network])
            data = load_data(setup.data)
            build_model(setup.model, data.image_shape, data.classes, 0)
            for name in self._attacks(cell):
                self._attack(job, cell, name)

    def run(self, job: Job) -> pd.DataFrame:
        """A row an image in ``results.csv``, a row a look in ``steps.csv``; then ``summary.csv`` and pictures."""
        results, looks = job.results(), job.results("steps.csv")
        with job.console.steps(
            "attacks", sum(cell.victims * len(self._attacks(cell)) for cell in self.cells)
        ) as advance:
            for cell, number, name in self._order():
                where = cell.keys | {"attack": name, "victim": number}
                if results.take(**where):
                    looks.take(**where)
                    advance(1, "taken from the earlier run")
                    continue
                found, truth = self._attacked(job, cell, number, name, where, results, looks)
                if number == 0:
                    keep_looks(found, truth, job.folder / "looks" / f"{_name(cell, name)}.pt")
                advance(1, f"{name}: {cell.network}, {cell.steps} steps, batch size {cell.batch_size}")
        results.add([])
        summary = self.summarise(results.frame)
        write_csv(summary, job.folder / "summary.csv")
        draw(results.frame, looks.frame, job)
        draw_evolution({_name(cell, name): (cell, name) for cell, number, name in self._order() if number == 0}, job)
        return summary

    def summarise(self, frame: pd.DataFrame) -> pd.DataFrame:
        """A row a cell and attack: the mean PSNR with Student's 95% interval, the published one, processor seconds."""

        def row(group: pd.DataFrame) -> dict[str, Any]:
            values = pd.to_numeric(group["psnr"])
            low, high = student(group.groupby("victim")["psnr"].mean())  # images of a batch are not independent
            first = group.iloc[0]
            known = self.published.get(f"{first['network']} {first['steps']} {first['attack']}")
            return {
                "victims": group["victim"].nunique(),
                "images": len(group),
                "psnr": _short(values.mean()),
                "psnr_low": _short(low),
                "psnr_high": _short(high),
                "published_psnr": known if first["batch_size"] == 1 else None,
                "median_mse": _short(group["mse"].median()),
                "accuracy": _short(group["accuracy"].mean()),
                "evaluations": _short(group["evaluations"].median()),
                "processor_seconds": _short(group["processor_seconds"].median()),
            }

        return by_group(frame, _KEYS, row)

    def _order(self) -> Iterator[tuple[Cell, int, str]]:
        """Victim by victim, so that every cell has its rows when a study is stopped."""
        for number in range(max(cell.victims for cell in self.cells)):
            for cell in self.cells:
                if number < cell.victims:
                    yield from ((cell, number, name) for name in self._attacks(cell))

    def _attacks(self, cell: Cell) -> list[str]:
        return [name for name in self.attacks if cell.network in self.only.get(name, [cell.network])]

    def _attack(self, job: Job, cell: Cell, name: str) -> tuple[Attack, Setup]:
        overrides = [*self.networks[cell.network], *self.attacks[name]]
        overrides += [f"federation.batch_size={cell.batch_size}", "federation=fedsgd"]
        return cell_attack(job, f"study.attacks.{name}", overrides)

    def _attacked(
        self,
        job: Job,
        cell: Cell,
        number: int,
        name: str,
        where: Mapping[str, Any],
        results: Results,
        looks: Results,
    ) -> tuple[Reconstruction, Truth]:
        attack, setup = self._attack(job, cell, name)
        data = load_data(setup.data)
        network = build_model(setup.model, data.image_shape, data.classes, _seed(job, cell, number))
        train_steps(network, data, cell.steps, generator(job.seed, "networks", "train", number))
        truth = draw_truth(data, cell, generator(job.seed, "networks", "batch", cell.batch_size, number))
        accuracy = _accuracy(network, data) if cell.steps else None
        network.train(cell.mode == "train")
        observation = client_update(network, truth.images, truth.labels, ONE_STEP, run=number)
        if setup.threat.labels:
            observation = replace(observation, labels=truth.labels.sort().values)
        knowledge = Knowledge(network, data.image_shape, data.classes, setup.threat)
        began = time.process_time()
        found = attack([observation], knowledge, device=job.device, seed=job.seed)[0]
        seconds = round(time.process_time() - began, 2)
        common = {"accuracy": accuracy, "evaluations": found.evaluations, "processor_seconds": seconds}
        common |= {"objective": _short(found.objective), "method": found.details.get("method")}
        rows = [
            {**where, "image": pair.image, "mse": _short(pair.mse), "psnr": _decibels(pair.mse), **common}
            for pair in match(found, truth, similarity=False)
        ]
        ways = [
            {**where, "evaluations": evaluations, "mse": _short(_error(found, images, truth))}
            for evaluations, images in found.snapshots
        ]
        looks.add(ways)
        results.add(rows)
        return found, truth


def draw_truth(data: ImageData, cell: Cell, random: torch.Generator) -> Truth:
    """A private batch whose labels are any, different or equal ones."""
    chosen = torch.arange(len(data.train_labels))
    if cell.labels == "equal":
        first = data.train_labels[int(torch.randint(len(chosen), (1,), generator=random))]
        chosen = chosen[data.train_labels == first]
    if len(chosen) < cell.batch_size:
        raise UsageError(
            f"study.cells: {data.name} has no {cell.batch_size} images of a class; make batch_size smaller"
        )
    drawn = draw_batch(
        data.train_labels[chosen], cell.batch_size, "different" if cell.labels == "different" else "iid", random
    )
    chosen = chosen[drawn]
    return Truth(1, 0, to_float(data.train_images[chosen]), data.train_labels[chosen])


def draw(frame: pd.DataFrame, looks: pd.DataFrame, job: Job) -> None:
    """``networks.png``: the median error against evaluations, a panel a network."""
    names = list(dict.fromkeys(frame["network"]))
    figure = Figure(figsize=(3.6 * len(names), 3.2), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, network in zip(panels, names, strict=True):
        part = looks[looks["network"] == network] if len(looks) else looks
        for number, (key, group) in enumerate(part.groupby(["steps", "attack"], sort=False) if len(part) else ()):
            steps, attack = key
            median = group.groupby("evaluations")["mse"].median()
            label = attack.replace("_", " ") + (f", {steps} steps" if steps else "")
            panel.plot(median.index, median, ".-", color=f"C{number}", label=label)
        panel.set_title(network, fontsize=9)
        panel.set_xlabel("evaluations")
        panel.set_yscale("log")
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7, frameon=False)
    panels[0].set_ylabel("MSE, median")
    figure.savefig(job.folder / "networks.png", dpi=110)


def keep_looks(found: Reconstruction, truth: Truth, path: Path) -> None:
    """The first private image and what was rebuilt of it on the way, for a picture also after an interruption."""
    looks = [*found.snapshots, (found.evaluations, found.images)]
    path.parent.mkdir(parents=True, exist_ok=True)
    images = torch.stack([truth.images[0], *(images[0].float().clamp(0, 1) for _, images in looks)])
    torch.save({"evaluations": [evaluations for evaluations, _ in looks], "images": images.half()}, path)


def draw_evolution(names: Mapping[str, tuple[Cell, str]], job: Job) -> None:
    """``evolution.png``: the first private image of each cell and attack, and the attack's images on the way."""
    kept = {name: job.folder / "looks" / f"{name}.pt" for name in names}
    kept = {name: path for name, path in kept.items() if path.exists()}
    if not kept:
        return
    columns = 7
    figure = Figure(figsize=(1.35 * (columns + 1), 1.6 * len(kept)), layout="constrained")
    panels = figure.subplots(len(kept), columns + 1, squeeze=False)
    for line, (name, path) in zip(panels, kept.items(), strict=True):
        looks = torch.load(path, weights_only=True)
        (cell, attack), evaluations = names[name], looks["evaluations"]
        chosen = np.unique(np.linspace(0, len(evaluations) - 1, columns).round().astype(int))
        of_cell = f"{cell.network}, {cell.steps} steps, B = {cell.batch_size}\n{attack.replace('_', ' ')}"
        titles = [of_cell, *(str(evaluations[place]) for place in chosen)]
        for panel in line:
            panel.axis("off")
        for panel, title, place in zip(line, titles, [0, *(1 + chosen)], strict=False):
            panel.imshow(looks["images"][place].float().permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=1)
            panel.set_title(title, fontsize=6)
    figure.savefig(job.folder / "evolution.png", dpi=110)


def _name(cell: Cell, attack: str) -> str:
    return f"{cell.network}-{cell.steps}-{cell.mode}-{cell.batch_size}-{cell.labels}-{attack}"


def _seed(job: Job, cell: Cell, number: int) -> int:
    return derive_seed(job.seed, "networks", cell.network, number)


def _accuracy(network: nn.Module, data: ImageData) -> float:
    network.eval()
    with torch.no_grad():
        guesses = network(to_float(data.test_images[:500])).argmax(1)
    return float((guesses == data.test_labels[:500]).double().mean())


def _error(found: Reconstruction, images: Tensor, truth: Truth) -> float:
    """The mean error of a batch's images in the best assignment."""
    pairs = match(replace(found, images=images.float()), truth, similarity=False)
    return float(np.mean([pair.mse for pair in pairs]))


def _decibels(mse: float | None) -> float | None:
    return None if not mse else round(-10 * math.log10(mse), 2)


def _short(value: float | None) -> float | None:
    return None if value is None or pd.isna(value) else float(f"{float(value):.4g}")
