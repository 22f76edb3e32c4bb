"""Attacks on fresh networks: data sets × attacks × batch sizes, a new network and a new private batch each time."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fedleak.attacks import Attack, Knowledge, Progress, Reconstruction
from fedleak.attacks.results import is_converged
from fedleak.config import Rule, list_of, whole
from fedleak.data import ImageData, to_float
from fedleak.errors import UsageError
from fedleak.evaluation.intervals import normal, of_median, wilson
from fedleak.evaluation.label_study import ONE_STEP, client_update, draw_batch
from fedleak.evaluation.matching import match
from fedleak.evaluation.metrics import label_accuracy, labels_exact
from fedleak.federation.scenario import load_data
from fedleak.instantiate import Part
from fedleak.models import build_model
from fedleak.outcome import write_csv
from fedleak.seeding import derive_seed, generator
from fedleak.studies.base import Job, Study, read_rows, require
from fedleak.studies.captured import Captured
from fedleak.studies.federations import cell_attack
from fedleak.studies.named_data import load_named
from fedleak.studies.summaries import by_group
from fedleak.threat import ThreatModel
from fedleak.truth import Truth

CHUNK = 50
"""Networks attacked in one call, if a study does not say."""

PUBLISHED_PROCEDURES = {"attack/inversion=as_published", "attack/inversion=published_code"}
"""Overrides of the attacks that `FreshNetworks.evaluations` is for."""

SHOWN = ["data", "attack", "batch_size", "networks", "label_accuracy", "recovered"]
SHOWN += ["converged", "blown_up", "median_mse"]
"""Columns of the summary for the terminal."""


@dataclass(frozen=True)
class Cell:
    """One point of a study: `networks` fresh networks on one data set, attacked in one way at one batch size."""

    data: str
    attack: str
    batch_size: int
    networks: int

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of ``results.csv`` belongs here."""
        where = row["data"], row["attack"], row["batch_size"]
        return where == (self.data, self.attack, self.batch_size) and row["network"] < self.networks


FREE = ("networks", "fewer", "datasets", "roots", "chunk", "resume", "batch_sizes")
"""Settings that may differ from those of an interrupted run: its rows do not depend on them."""


def earlier_rows(folder: Path, job: Job, said: str) -> list[dict[str, Any]]:
    """The rows of an interrupted run of the same study.

    Raises:
        UsageError: there are none, or their settings were others.
    """
    if job.folder.absolute() == folder.absolute():
        raise UsageError(f"study.resume={said}: is output_dir itself; name another output_dir")
    results, facts = folder / "results.csv", folder / "study.json"
    if not results.is_file() or not facts.is_file():
        raise UsageError(f"study.resume={said}: no results.csv and study.json there; name an interrupted run's folder")
    before = json.loads(facts.read_text())
    now = {} if job.setup.study is None else dict(job.setup.study.node)
    was = before["settings"] or {}
    differing = [key for key in sorted({*now, *was} - set(FREE)) if now.get(key) != was.get(key)]
    differing += [key for key, value in (("seed", job.seed), ("model", job.setup.model.node)) if before[key] != value]
    if differing:
        raise UsageError(f"study.resume={said}: {differing[0]} was another there; give the same, or begin anew")
    return read_rows(results)


def draw_victims(
    data: ImageData,
    model: Part,
    networks: Sequence[int],
    batch_size: int,
    threat: ThreatModel,
    seed: int,
    train: Callable[[nn.Module, int], None] | None = None,
) -> Captured:
    """Fresh networks by their numbers, and one update of each; its round is the number plus one.

    A network and its batch depend on (seed, data set, batch size, number) only: other attacks meet the same ones.
    `train` is called with each network and its number, before its client.
    """
    observations, truths = [], []
    training = replace(ONE_STEP, per_sample=threat.per_sample_gradients)
    for number in networks:
        network = build_model(
            model, data.image_shape, data.classes, derive_seed(seed, "model", data.name, batch_size, number)
        )
        if train is not None:
            train(network, number)
        random = generator(seed, "batch", data.name, batch_size, number)
        chosen = draw_batch(data.train_labels, batch_size, "iid", random)
        images, labels = to_float(data.train_images[chosen]), data.train_labels[chosen]
        observations.append(client_update(network, images, labels, training, run=number))
        truths.append(Truth(number + 1, 0, images, labels))
    return Captured(Knowledge(network, data.image_shape, data.classes, threat), observations, truths)


def judge(reconstruction: Reconstruction, truth: Truth) -> dict[str, Any]:
    """The row of one attacked batch; MSE is the mean over its images in the best assignment, empty without images."""
    pairs = match(reconstruction, truth, similarity=False)
    errors = [pair.mse for pair in pairs if pair.mse is not None]
    return {
        "label_accuracy": label_accuracy(truth.labels, reconstruction.labels),
        "labels_exact": labels_exact(truth.labels, reconstruction.labels),
        "last_label_accuracy": label_accuracy(truth.labels, last_labels(reconstruction)),
        "mse": _short(sum(errors) / len(errors)) if errors else None,
        "recovered": sum(bool(pair.recovered) for pair in pairs) / len(pairs) if errors else None,
        "objective": _short(reconstruction.objective),
        "blown_up": blown_up(reconstruction.trace),
        "evaluations": reconstruction.evaluations,
        "stop_reason": reconstruction.stop_reason,
        "seconds": _short(reconstruction.seconds),
    }


def last_labels(reconstruction: Reconstruction) -> Tensor:
    """The labels at a joint attack's last step, ``[B]``; any other attack's labels do not move."""
    said = reconstruction.details.get("last_labels")
    return reconstruction.labels if said is None else torch.tensor([int(label) for label in said.split()])


def blown_up(trace: Sequence[tuple[int, float]]) -> bool | None:
    """Whether a start ended no better than it began, or at a value that is no number; None without such a trace."""
    return not trace[-1][1] < trace[0][1] if len(trace) > 1 else None


@dataclass
class FreshNetworks(Study):
    """Attacks on fresh networks. A subclass draws the pictures, and says what else the summary should hold.

    The model is the configuration's `model`.

    Args:
        attacks: name -> overrides that choose and set it, such as ``[attack=dlg, attack.restarts=1]``.
        batch_sizes: samples of a private batch.
        networks: how many networks, one number or one for each batch size.
        datasets: choices of ``data``; None takes the configuration's `data`.
        roots: data set -> the folder of its files, see `load_named`.
        fewer: data set -> attack -> networks, where `networks` would take too long.
        evaluations: for each batch size, ``attack.max_evaluations`` of the attacks that are chosen with
            ``attack/inversion=as_published`` or ``published_code``; None for what their overrides say.
        chunk: networks attacked in one call; their rows are on disk before the next ones are drawn.
        resume: the run directory of an interrupted run of the same study: its rows are taken, the others computed.
    """

    attacks: Mapping[str, Sequence[str]]
    networks: int | Sequence[int]
    batch_sizes: Sequence[int] = (1,)
    datasets: Sequence[str] | None = None
    roots: Mapping[str, str | None] | None = None
    fewer: Mapping[str, Mapping[str, int] | None] | None = None
    evaluations: Sequence[int] | None = None
    chunk: int = CHUNK
    resume: str | None = None

    def __post_init__(self) -> None:
        require("batch_sizes", self.batch_sizes, list_of(1))
        require("networks", self.networks, whole(1) if isinstance(self.networks, int) else list_of(1))
        if not isinstance(self.networks, int) and len(self.networks) != len(self.batch_sizes):
            raise UsageError(
                f"study.networks={self.networks}: must be one number, or one for each of {self.batch_sizes}"
            )
        require("chunk", self.chunk, whole(1))
        if self.evaluations is not None:
            require("evaluations", self.evaluations, list_of(1))
            if len(self.evaluations) != len(self.batch_sizes):
                raise UsageError(f"study.evaluations={self.evaluations}: must be one for each of {self.batch_sizes}")
        named = Rule(lambda v: v is None or (isinstance(v, list) and len(v) > 0), "a list of choices of data")
        require("datasets", self.datasets, named)
        for data, counted in (self.fewer or {}).items():
            for attack, count in (counted or {}).items():
                require(f"fewer.{data}.{attack}", count, whole(1))
                if attack not in self.attacks:
                    known = ", ".join(self.attacks)
                    raise UsageError(f"study.fewer.{data}.{attack}: no such attack here; known: {known}")

    def check(self, job: Job) -> None:
        """The data are there, and every attack can be made of its overrides and takes the batches."""
        data = self._data(job)
        if self.resume is not None:
            earlier_rows(Path(self.resume), job, self.resume)
        for name in data:
            build_model(job.setup.model, data[name].image_shape, data[name].classes, 0)
        for name in self.attacks:
            for batch_size in self.batch_sizes:
                self._attack(job, name, batch_size)

    def run(self, job: Job) -> pd.DataFrame:
        """Attack every cell's networks, a row a network in ``results.csv``; then summary and pictures."""
        data, results = self._data(job), job.results()
        cells = list(self.cells(data))
        earlier = results.earlier if self.resume is None else earlier_rows(Path(self.resume), job, self.resume)
        with job.console.steps("networks", sum(cell.networks for cell in cells)) as advance:
            for cell in cells:
                done = [row for row in earlier if cell.holds(row)]
                results.rows += done  # on disk with the next ones: what is there already must not get shorter
                advance(len(done), "taken from the earlier run")
                for rows in self._attacked(job, data[cell.data], cell, advance, {row["network"] for row in done}):
                    results.add(rows)
        results.add([])
        summary = self.summarise(results.frame)
        write_csv(summary, job.folder / "summary.csv")
        self.draw(results.frame, summary, job)
        return summary[[column for column in SHOWN if column in summary]].round(6)

    def summarise(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows of ``summary.csv`` from those of ``results.csv``: a row a cell, with 95% intervals.

        Wilson's for shares of networks, from standard errors for means over batches, from the order of the values for
        medians. `labels_exact`, `converged` and `blown_up` are shares of networks, `recovered` of images.
        """

        def row(cell: pd.DataFrame) -> dict[str, Any]:
            values: dict[str, Any] = {"networks": len(cell)}
            single, imaged = bool((cell["batch_size"] == 1).all()), bool(cell["mse"].notna().any())
            shares = {"labels_exact": cell["labels_exact"]}
            means = {name: cell[name] for name in ("label_accuracy", "last_label_accuracy")}
            if imaged:
                shares["converged"] = cell["stop_reason"].map(is_converged)
                shares["blown_up"] = cell["blown_up"].dropna()
                means["recovered"] = cell["recovered"]
            for name, measured in (means | shares).items():
                mean = float(measured.astype(float).mean())
                share = name in shares or single
                low, high = wilson(mean, len(cell)) if share else normal(measured.astype(float))
                values |= {name: mean, f"{name}_low": max(0.0, low), f"{name}_high": min(1.0, high)}
            if imaged:
                low, high = of_median(cell["mse"])
                values |= {"median_mse": cell["mse"].median(), "median_mse_low": low, "median_mse_high": high}
            return values | {"median_evaluations": cell["evaluations"].median(), "seconds": cell["seconds"].sum()}

        summary = by_group(frame, ["data", "attack", "batch_size"], row)
        return summary.apply(lambda column: column.map(_short) if column.dtype == float else column)

    @abstractmethod
    def draw(self, frame: pd.DataFrame, summary: pd.DataFrame, job: Job) -> None:
        """The pictures."""

    def cells(self, data: Mapping[str, ImageData]) -> Iterator[Cell]:
        """Every point of the study, data set by data set, the attacks in turn, small batches first."""
        counts = [self.networks] * len(self.batch_sizes) if isinstance(self.networks, int) else self.networks
        for name in data:
            fewer = (self.fewer or {}).get(name) or {}
            for attack in self.attacks:
                for batch_size, networks in zip(self.batch_sizes, counts, strict=True):
                    yield Cell(name, attack, batch_size, min(fewer.get(attack, networks), networks))

    def _data(self, job: Job) -> dict[str, ImageData]:
        if self.datasets is None:
            data = load_data(job.setup.data)
            return {data.name: data}
        return load_named(self.datasets, self.roots or {}, job.overrides)

    def _attack(self, job: Job, name: str, batch_size: int) -> tuple[Attack, ThreatModel]:
        overrides = [*self.attacks[name], f"federation.batch_size={batch_size}", "federation=fedsgd"]
        if self.evaluations is not None and PUBLISHED_PROCEDURES & set(overrides):
            most = self.evaluations[list(self.batch_sizes).index(batch_size)]
            overrides.append(f"attack.max_evaluations={most}")
        attack, setup = cell_attack(job, f"study.attacks.{name}", overrides)
        return attack, setup.threat

    def _attacked(
        self, job: Job, data: ImageData, cell: Cell, advance: Callable[[int, str], None], done: Collection[int] = ()
    ) -> Iterator[list[dict[str, Any]]]:
        """The rows of one cell, `chunk` networks at a time; without those that are `done`."""
        attack, threat = self._attack(job, cell.attack, cell.batch_size)
        what = f"{cell.attack} on {cell.data}, batch size {cell.batch_size}"
        left = [number for number in range(cell.networks) if number not in done]
        for first in range(0, len(left), self.chunk):
            numbers = left[first : first + self.chunk]
            victims = draw_victims(data, job.setup.model, numbers, cell.batch_size, threat, job.seed)

            def tell(state: Progress, first: int = first) -> None:
                advance(0, f"{what}: {first + state.done} done, {state.evaluations_per_second:,.0f}/s")

            found = attack(victims.observations, victims.knowledge, device=job.device, seed=job.seed, on_progress=tell)
            where = {"data": cell.data, "attack": cell.attack, "batch_size": cell.batch_size}
            yield [
                {**where, "network": number, **judge(reconstruction, truth)}
                for number, reconstruction, truth in zip(numbers, found, victims.truths, strict=True)
            ]
            advance(len(numbers), what)


def _short(value: float) -> float:
    """Four significant digits: what a table of thousands of rows needs."""
    return float(f"{value:.4g}")
