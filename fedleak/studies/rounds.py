"""Leakage against training round: one federation from its first round to a trained model, attacked on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from fedleak.config import NAMES, list_of, whole
from fedleak.errors import UsageError
from fedleak.evaluation.intervals import normal
from fedleak.evaluation.matching import Match
from fedleak.outcome import write_csv
from fedleak.report.pictures import reconstructions_png
from fedleak.rounds import is_due
from fedleak.studies.base import Job, Study, require
from fedleak.studies.captured import check_federations, run_and_attack
from fedleak.studies.summaries import OURS, by_group, image_summary, label_summary, look, spread


@dataclass
class Rounds(Study):
    """Labels and images at many moments of the same federation, with its test accuracy beside them.

    The federation is the configuration's, and so is the attack that rebuilds the images.

    Args:
        rounds: of the federation.
        every: labels are attacked, and the test accuracy is measured, in rounds 1, 1 + every, …
        moments: the rounds in which images are attacked, some of those.
        clients: victims of each moment.
        methods: choices of ``attack/labels``.
        seeds: federations, from the configuration's seed on.
    """

    rounds: int
    every: int
    moments: Sequence[int]
    clients: int
    methods: Sequence[str]
    seeds: int

    def __post_init__(self) -> None:
        for key in ("rounds", "every", "clients", "seeds"):
            require(key, getattr(self, key), whole(1))
        require("moments", self.moments, list_of(1))
        require("methods", self.methods, NAMES)
        for moment in self.moments:
            if moment > self.rounds or not is_due(moment, self.every):
                captured = f"1, {1 + self.every}, … up to {self.rounds}"
                mend = "name others, or change study.every"
                raise UsageError(f"study.moments={moment}: not among the captured rounds {captured}; {mend}")

    def check(self, job: Job) -> None:
        """The federations can run, and the attack and the methods take their updates."""
        check_federations(job, self._cells(job), job.methods(self.methods))

    def run(self, job: Job) -> pd.DataFrame:
        """Write ``labels.csv``, ``images.csv``, ``accuracy.csv``, their summaries, and the pictures."""
        labels, images, accuracy = job.results("labels.csv"), job.results("images.csv"), job.results("accuracy.csv")
        first: list[Match] = []
        cells = self._cells(job)
        moments = dict.fromkeys(cells, self.moments)
        for done in run_and_attack(job, cells, job.methods(self.methods), moments, self.clients):
            where = {"federation": done.name}
            rounds = pd.read_csv(done.outcome.folder / "rounds.csv").dropna(subset=["test_accuracy"])
            course = rounds[["round", "test_accuracy"]].itertuples(index=False)
            accuracy.add({**where, "round": number, "test_accuracy": share} for number, share in course)
            labels.add({**where, **row} for row in done.labels)
            images.add({**where, **match.row()} for match in done.matches)
            first = first or [match for match in done.matches if match.client == 0]

        by_label = label_summary(labels.frame, ["round", "method"])
        by_image = image_summary(images.frame, ["round"])
        write_csv(by_label, job.folder / "label_summary.csv")
        utility = by_group(accuracy.frame, ["round"], _accuracy).round(4)
        summary = utility.merge(by_image, on="round")
        write_csv(utility, job.folder / "accuracy_summary.csv")
        write_csv(summary, job.folder / "summary.csv")
        _draw(utility, by_label, by_image, job.folder / "rounds.png")
        reconstructions_png(
            job.folder / "reconstructions.png", first, title="What the server rebuilt, as training goes on"
        )
        wide = by_label.pivot(index="round", columns="method", values="label_accuracy")[list(self.methods)]
        return summary[["round", "test_accuracy", "images", "recovered", "psnr"]].merge(wide, on="round")

    def _cells(self, job: Job) -> dict[str, list[str]]:
        often = [f"federation.{key}_every={self.every}" for key in ("capture", "evaluate")]
        changes = [f"federation.rounds={self.rounds}", *often]
        return {f"seed-{seed}": [f"seed={seed}", *changes] for seed in range(job.seed, job.seed + self.seeds)}


def _accuracy(group: pd.DataFrame) -> dict[str, float]:
    """Mean test accuracy with a 95% interval over federations."""
    low, high = normal(group["test_accuracy"])
    mean = {"runs": len(group), "test_accuracy": group["test_accuracy"].mean()}
    return mean | {"accuracy_low": low, "accuracy_high": min(1.0, high)}


def _draw(accuracy: pd.DataFrame, labels: pd.DataFrame, images: pd.DataFrame, path: Path) -> None:
    """Four panels over the rounds: utility, labels, images recovered, and how close the images came."""
    figure = Figure(figsize=(11.5, 7.4), layout="constrained")
    (utility, guessed), (recovered, closeness) = figure.subplots(2, 2, sharex=True)
    utility.plot(accuracy["round"], accuracy["test_accuracy"], color="#1d4ed8")
    utility.fill_between(
        accuracy["round"], accuracy["accuracy_low"], accuracy["accuracy_high"], color="#1d4ed8", alpha=0.15, linewidth=0
    )
    utility.axhline(0.95, color="0.6", linewidth=0.8, linestyle=":")
    utility.set_title("test accuracy of the shared model (dotted: 95%)")
    others = (f"C{i}" for i in (0, 1, 2, 4, 5, 6, 8, 9) * 4)
    for name, part in ((str(name), part) for name, part in labels.groupby("method", sort=False)):
        color, style = look(name, next(others))
        width = 2.2 if name == OURS else 1.1
        guessed.plot(part["round"], part["label_accuracy"], style, color=color, linewidth=width, label=name)
        guessed.fill_between(part["round"], part["low"], part["high"], color=color, alpha=0.08, linewidth=0)
    guessed.set_title("labels inferred rightly")
    guessed.legend(fontsize=8, frameon=False, ncols=2, loc="lower left")
    for panel, value, bounds in (
        (recovered, "recovered", ("low", "high")),
        (closeness, "psnr", ("psnr_low", "psnr_high")),
    ):
        bars = {"yerr": spread(images, value, *bounds), "capsize": 3}
        panel.errorbar(images["round"], images[value], **bars, color="#c2410c", marker="o", markersize=4)
    recovered.set_title("images recovered (mean squared error below 1e-3)")
    closeness.set_title("median PSNR of the rebuilt images, dB")
    for panel in (utility, guessed, recovered):
        panel.set_ylim(-0.02, 1.02)
    closeness.set_ylim(bottom=0)
    for panel in (utility, guessed, recovered, closeness):
        panel.set_xscale("log")
        panel.grid(alpha=0.25)
    for panel in (recovered, closeness):
        panel.set_xlabel("round of training")
    figure.suptitle("Leakage against training round (bars and bands: 95% intervals)")
    figure.savefig(path, dpi=110)
