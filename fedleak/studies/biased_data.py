"""What skewed data do to the leaks and to utility: the same federations with their data split in several ways."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedleak.config import NAMES, Rule, whole
from fedleak.errors import UsageError
from fedleak.evaluation.intervals import normal
from fedleak.outcome import write_csv
from fedleak.report.pictures import reconstructions_png
from fedleak.studies.base import Job, Study, require
from fedleak.studies.captured import check_federations, run_and_attack
from fedleak.studies.summaries import by_group, image_summary, label_summary, look, spread

KEYS = ["federation", "partition"]

_overrides = Rule(
    lambda v: isinstance(v, Mapping) and len(v) > 0 and all(isinstance(x, list) for x in v.values()),
    "names with a list of overrides each",
)


@dataclass
class BiasedData(Study):
    """Federations × partitions × seeds: labels by several methods, images, and the test accuracy at the end.

    The attack that rebuilds the images is the configuration's.

    Args:
        federations: name -> overrides, such as ``[federation=fedavg, federation.local_steps=5]``.
        partitions: name -> overrides, such as ``[partition=dirichlet, partition.alpha=0.1]``.
        moments: name of a federation -> the rounds in which images are attacked; of the others only labels are.
        victims: clients whose images are attacked at each moment.
        methods: choices of ``attack/labels``; they read every captured update (``federation.capture_every``).
        seeds: repetitions, from the configuration's seed on.
    """

    federations: Mapping[str, Sequence[str]]
    partitions: Mapping[str, Sequence[str]]
    moments: Mapping[str, Sequence[int]]
    victims: int
    methods: Sequence[str]
    seeds: int

    def __post_init__(self) -> None:
        require("federations", self.federations, _overrides)
        require("partitions", self.partitions, _overrides)
        require("victims", self.victims, whole(1))
        require("seeds", self.seeds, whole(1))
        require("methods", self.methods, NAMES)
        for name in self.moments:
            if name not in self.federations:
                known = ", ".join(self.federations)
                raise UsageError(f"study.moments.{name}: no such federation here; known: {known}")

    def check(self, job: Job) -> None:
        """The federations can run, and the attack and the methods take their updates."""
        check_federations(job, self._cells(job), job.methods(self.methods))

    def run(self, job: Job) -> pd.DataFrame:
        """Write ``labels.csv``, ``images.csv``, ``utility.csv``, their summaries, and the pictures."""
        labels, images, utility = job.results("labels.csv"), job.results("images.csv"), job.results("utility.csv")
        places = self._places(job)
        moments = {name: self.moments.get(federation, ()) for name, (federation, _, _) in places.items()}
        for done in run_and_attack(job, self._cells(job), job.methods(self.methods), moments, self.victims):
            federation, partition, seed = places[done.name]
            where = {"federation": federation, "partition": partition, "seed": seed}
            classes = [len(truth.labels.unique()) for truth in done.captured.truths]
            accuracy = done.outcome.summary["final_test_accuracy"]
            utility.add([{**where, "test_accuracy": accuracy, "classes_per_update": np.mean(classes)}])
            labels.add({**where, **row} for row in done.labels)
            if done.matches:
                images.add({**where, **match.row()} for match in done.matches)
            if done.matches and seed == job.seed:
                picture = f"{federation} {partition}.png".replace(" ", "_")
                title = f"What the server rebuilt: {federation}, {partition} data"
                reconstructions_png(job.folder / picture, done.matches, title=title)

        by_label = label_summary(labels.frame, [*KEYS, "method"])
        by_image = image_summary(images.frame, KEYS) if images.rows else pd.DataFrame(columns=KEYS)
        by_federation = by_group(utility.frame, KEYS, _utility).round(4)
        write_csv(by_label, job.folder / "label_summary.csv")
        write_csv(by_image, job.folder / "image_summary.csv")
        write_csv(by_federation, job.folder / "utility_summary.csv")
        _draw(by_federation, by_label, by_image, job.folder / "biased_data.png")
        wide = by_label.pivot(index=KEYS, columns="method", values="label_accuracy")[list(self.methods)].reset_index()
        shown = by_federation[[*KEYS, "test_accuracy", "classes_per_update"]].merge(wide, on=KEYS)
        return shown.merge(by_image[[c for c in (*KEYS, "recovered", "psnr") if c in by_image]], on=KEYS, how="left")

    def _places(self, job: Job) -> dict[str, tuple[str, str, int]]:
        """Cell's name -> federation, partition, seed."""
        seeds = range(job.seed, job.seed + self.seeds)
        each = itertools.product(self.federations, self.partitions, seeds)
        return {
            f"{federation} {partition} seed-{seed}": (federation, partition, seed)
            for federation, partition, seed in each
        }

    def _cells(self, job: Job) -> dict[str, list[str]]:
        return {
            name: [*self.federations[federation], *self.partitions[partition], f"seed={seed}"]
            for name, (federation, partition, seed) in self._places(job).items()
        }


def _utility(group: pd.DataFrame) -> dict[str, float]:
    """Mean final test accuracy with a 95% interval over seeds, and how many classes an update holds on average."""
    low, high = normal(group["test_accuracy"])
    mean = {"runs": len(group), "test_accuracy": group["test_accuracy"].mean()}
    return mean | {"low": low, "high": high, "classes_per_update": group["classes_per_update"].mean()}


def _draw(utility: pd.DataFrame, labels: pd.DataFrame, images: pd.DataFrame, path: Path) -> None:
    """A panel a federation for the labels, then one for the images and one for utility; bars by partition."""
    federations = list(dict.fromkeys(labels["federation"]))
    figure = Figure(figsize=(6.2 * max(2, len(federations)), 7.6), layout="constrained")
    halves = np.asarray(figure.subfigures(2, 1))
    for axes, federation in zip(np.atleast_1d(halves[0].subplots(1, len(federations))), federations, strict=True):
        part = labels[labels["federation"] == federation]
        _bars(axes, part, "method", "label_accuracy")
        axes.set_title(f"{federation}: labels inferred rightly")
        axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, -0.32))
    leak, cost = halves[1].subplots(1, 2)
    if len(images):
        _bars(leak, images, "federation", "recovered")
    leak.set_title("images recovered (mean squared error below 1e-3)")
    _bars(cost, utility, "federation", "test_accuracy")
    cost.set_title("test accuracy of the shared model at the end")
    for axes in (leak, cost):
        if axes.has_data():
            axes.legend(fontsize=8, loc="lower right")
    figure.suptitle("What skewed data do (bars: 95% intervals)")
    figure.savefig(path, dpi=110)


def _bars(axes: Axes, table: pd.DataFrame, series: str, value: str) -> None:
    """Groups of bars, a group a partition and a bar a value of `series`."""
    partitions, names = list(dict.fromkeys(table["partition"])), list(dict.fromkeys(table[series]))
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        part = table[table[series] == name].set_index("partition").reindex(partitions)
        places = np.arange(len(partitions)) + (i - (len(names) - 1) / 2) * width
        color, _ = look(name, f"C{(0, 1, 2, 4, 5, 6, 8, 9)[i % 8]}")
        axes.bar(
            places, part[value], width, yerr=spread(part, value), color=color, label=name, error_kw={"linewidth": 0.9}
        )
    axes.set_xticks(range(len(partitions)), partitions)
    axes.set_ylim(0, 1.05)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
