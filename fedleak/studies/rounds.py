"""Leakage against training round: one federation from its first round to a trained model, attacked on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from fedleak.config import Rule, whole
from fedleak.errors import UsageError
from fedleak.evaluation.intervals import normal
from fedleak.evaluation.scores import Match
from fedleak.federation.rounds import is_due
from fedleak.pipeline import build_attack, write_csv
from fedleak.report.pictures import reconstructions_png
from fedleak.studies.base import Job, Study, require
from fedleak.studies.captured import (
    attack_images,
    attack_labels,
    check_federations,
    image_summary,
    label_summary,
    load_captured,
    load_methods,
    without_attack,
)
from fedleak.studies.federations import cell_config, run_cells
from fedleak.studies.labels import CONTROL, OURS

_several = Rule(lambda v: isinstance(v, list) and len(v) > 0 and all(map(whole(1).test, v)), "a list of rounds from 1")


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

    def __init__(
        self, rounds: int, every: int, moments: Sequence[int], clients: int, methods: Sequence[str], seeds: int
    ) -> None:
        for key, value in (("rounds", rounds), ("every", every), ("clients", clients), ("seeds", seeds)):
            require(key, value, whole(1))
        require("moments", moments, _several)
        for moment in moments:
            if moment > rounds or not is_due(moment, every):
                raise UsageError(
                    f"study.moments={moment}: not among the captured rounds 1, {1 + every}, … up to {rounds}; "
                    "name others, or change study.every"
                )
        self.moments = sorted(set(moments))
        self.clients = clients
        self.methods = load_methods(methods)
        often = [f"federation.{key}_every={every}" for key in ("capture", "evaluate")]
        self.changes = [f"federation.rounds={rounds}", *often]
        self.seeds = seeds

    def check(self, job: Job) -> None:
        """The federations can run, and the attack and the methods take their updates."""
        check_federations(job, self._cells(job), self.methods)

    def run(self, job: Job) -> pd.DataFrame:
        """Write ``labels.csv``, ``images.csv``, ``accuracy.csv``, their summaries, and the pictures."""
        attack = build_attack(job.config)
        assert attack is not None  # checked before
        labels, images, accuracy = job.results("labels.csv"), job.results("images.csv"), job.results("accuracy.csv")
        first: list[Match] = []
        cells = self._cells(job)
        for index, (name, outcome) in enumerate(run_cells(without_attack(job), cells)):
            rounds = pd.read_csv(outcome.folder / "rounds.csv").dropna(subset=["test_accuracy"])
            course = rounds[["round", "test_accuracy"]].itertuples(index=False)
            accuracy.add({"federation": name, "round": number, "test_accuracy": share} for number, share in course)
            captured = load_captured(cell_config(without_attack(job), cells[name]), outcome.folder)
            seed = job.seed + index
            labels.add({"federation": name, **row} for row in attack_labels(captured, self.methods, seed))
            victims = captured.some(self.moments, self.clients)
            with job.console.attack(attack.name, len(victims.observations)) as on_progress:
                matches = attack_images(victims, attack, device=job.device, seed=seed, on_progress=on_progress)
            images.add({"federation": name, **match.row()} for match in matches)
            first = first or [match for match in matches if match.client == 0]

        by_label = label_summary(labels.frame, ["round", "method"])
        by_image = image_summary(images.frame, ["round"])
        write_csv(by_label, job.folder / "label_summary.csv")
        utility = _accuracy_summary(accuracy.frame)
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
        return {f"seed-{seed}": [f"seed={seed}", *self.changes] for seed in range(job.seed, job.seed + self.seeds)}


def _accuracy_summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean test accuracy by round with a 95% interval over federations."""
    rows = []
    for number, group in frame.groupby("round"):
        low, high = normal(group["test_accuracy"])
        rows.append(
            {"round": number, "runs": len(group), "test_accuracy": group["test_accuracy"].mean()}
            | {"accuracy_low": low, "accuracy_high": min(1.0, high)}
        )
    return pd.DataFrame(rows).round(4)


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
    for name, part in labels.groupby("method", sort=False):
        color = {OURS: "#c2410c", CONTROL: "0.5"}.get(str(name)) or next(others)
        style = ":" if name == CONTROL else "-"
        guessed.plot(
            part["round"],
            part["label_accuracy"],
            style,
            color=color,
            linewidth=2.2 if name == OURS else 1.1,
            label=name,
        )
        guessed.fill_between(part["round"], part["low"], part["high"], color=color, alpha=0.08, linewidth=0)
    guessed.set_title("labels inferred rightly")
    guessed.legend(fontsize=8, frameon=False, ncols=2, loc="lower left")
    for panel, value, low, high in (
        (recovered, "recovered", "low", "high"),
        (closeness, "psnr", "psnr_low", "psnr_high"),
    ):
        spread = [(images[value] - images[low]).clip(lower=0), (images[high] - images[value]).clip(lower=0)]
        panel.errorbar(
            images["round"], images[value], yerr=spread, color="#c2410c", marker="o", markersize=4, capsize=3
        )
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
