"""Which method reads the labels off an update best, by batch size, skew and stage of training.

``fedleak labels`` starts it with settings of its own, ``fedleak run experiment=label_inference`` as one of the studies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fedleak.attacks import Knowledge
from fedleak.attacks.labels.last_layer import find_last_layer
from fedleak.config import NAMES, list_of, whole
from fedleak.data import to_float
from fedleak.evaluation.label_study import Partition, client_update, draw_batch, label_study
from fedleak.federation.scenario import load_data
from fedleak.models import build_model
from fedleak.outcome import write_csv
from fedleak.seeding import derive_seed, generator
from fedleak.studies.base import Job, Study, require
from fedleak.studies.summaries import OURS, by_group, label_shares, look
from fedleak.training import LocalTraining


@dataclass
class LabelInferenceStudy(Study):
    """Label inference methods × batch sizes × skew × stages, on fresh networks.

    What victims do with their batches is the configuration's `federation`.

    Args:
        methods: choices of ``attack/labels``.
        batch_sizes: samples per local step.
        stages: training steps before the attack.
        runs: networks.
        partitions: how a victim's batch is drawn.
        key: where the settings stand in the configuration, for error messages.
    """

    methods: Sequence[str]
    batch_sizes: Sequence[int]
    stages: Sequence[int]
    runs: int
    partitions: Sequence[Partition] = ("iid", "biased")
    key: str = "study"

    def __post_init__(self) -> None:
        rules = {"methods": NAMES, "batch_sizes": list_of(1), "stages": list_of(0), "runs": whole(1)}
        for name, rule in rules.items():
            require(name, getattr(self, name), rule, self.key)

    def check(self, job: Job) -> None:
        """The methods and the data are there, and the model takes the images."""
        job.methods(self.methods, f"{self.key}.methods")
        data = load_data(job.setup.data)
        build_model(job.setup.model, data.image_shape, data.classes, 0)

    def run(self, job: Job) -> pd.DataFrame:
        """Write ``labels.csv``, ``summary.csv`` and the pictures; returns the mean label accuracies."""
        data, training = load_data(job.setup.data), replace(job.setup.training, per_sample=False)
        images = to_float(torch.cat([data.train_images, data.test_images]))
        labels = torch.cat([data.train_labels, data.test_labels])

        def network(run: int) -> nn.Module:
            return build_model(job.setup.model, data.image_shape, data.classes, derive_seed(job.seed, "model", run))

        total = len(self.methods) * len(self.batch_sizes) * len(self.stages) * len(self.partitions)
        with job.console.cells("label inference", total) as on_cell:
            frame = label_study(
                images,
                labels,
                model=network,
                methods=job.methods(self.methods, f"{self.key}.methods"),
                batch_sizes=self.batch_sizes,
                partitions=self.partitions,
                stages=self.stages,
                runs=self.runs,
                data=job.setup.data.name,
                training=training,
                seed=job.seed,
                on_cell=on_cell,
                earlier=job.results("labels.csv").earlier,
                on_rows=lambda rows: write_csv(rows, job.folder / "labels.csv"),
            )
        write_csv(frame, job.folder / "labels.csv")
        summary = summarise(frame)
        write_csv(summary, job.folder / "summary.csv")
        _lines(summary, "batch_size", "label_accuracy", "Labels inferred rightly", job.folder / "accuracy.png")
        _lines(summary, "batch_size", "labels_exact", "Whole batch right", job.folder / "whole_batch.png")
        if summary["stage"].nunique() > 1:
            _lines(summary, "stage", "label_accuracy", "Labels inferred rightly", job.folder / "stages.png")
        self._scatter(network, images, labels, training, job)
        return _pivot(summary)

    def _scatter(
        self, network: Callable[[int], nn.Module], images: Tensor, labels: Tensor, training: LocalTraining, job: Job
    ) -> None:
        """What every counting method lives on: a class's gradient, summed over its inputs, against its count."""
        size = max(s for s in self.batch_sizes if s <= len(labels))
        known = Knowledge(network(0), tuple(images.shape[1:]), int(labels.max()) + 1)  # type: ignore[arg-type]
        figure = Figure(figsize=(5.2 * len(self.partitions) + 0.5, 4.0), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(self.partitions), sharey=True))
        for panel, partition in zip(panels, self.partitions, strict=True):
            for run in range(min(10, self.runs)):
                random = generator(job.seed, "scatter", partition, run)
                batch = draw_batch(labels, size * (training.local_steps or 1), partition, random)
                observation = client_update(network(run), images[batch], labels[batch], training, run=run)
                sums = observation.gradient()[find_last_layer(known).weight].sum(dim=1)
                counts = torch.bincount(labels[batch], minlength=len(sums))
                panel.scatter(counts + 0.1 * torch.rand(len(counts)) - 0.05, sums, s=9, alpha=0.6, color="#1d4ed8")
            panel.axhline(0, color="0.6", linewidth=0.8)
            panel.set_title(f"{partition}, batch size {size}, untrained")
            panel.set_xlabel("samples of the class in the batch")
            panel.grid(alpha=0.25)
        panels[0].set_ylabel("gradient of the class, summed over inputs")
        figure.savefig(job.folder / "gradient_against_count.png", dpi=110)


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a method, partition, stage and batch size: means over runs, see `label_shares`."""

    def row(group: pd.DataFrame) -> dict[str, float]:
        return {"runs": len(group), **label_shares(group)} | {
            name: group[name].mean() for name in ("counts_exact", "seconds")
        }

    return by_group(frame, ["method", "data", "partition", "stage", "batch_size"], row).round(6)


def _lines(summary: pd.DataFrame, x: str, y: str, title: str, path: Path) -> None:
    """`y` against `x`, a panel for each partition (and for each value of the other axis, if it has several)."""
    other = "stage" if x == "batch_size" else "batch_size"
    panels = list(summary.groupby(["partition", other], sort=False))
    figure = Figure(figsize=(5.2 * len(panels) + 1.8, 4.2), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    names = list(dict.fromkeys(summary["method"]))
    low, high = ("low", "high") if y == "label_accuracy" else ("exact_low", "exact_high")
    for panel, ((partition, value), part) in zip(axes, panels, strict=True):
        for i, name in enumerate(names):
            line = part[part["method"] == name].sort_values(x)
            color, dashes = look(name, f"C{i % 10}", "-" if i < 10 else "--")
            width = 2.4 if name == OURS else 1.2
            panel.plot(line[x], line[y], dashes, color=color, linewidth=width, marker="o", markersize=3, label=name)
            panel.fill_between(line[x], line[low], line[high], color=color, alpha=0.08, linewidth=0)
        if x == "batch_size":
            panel.set_xscale("log", base=2)
            sizes = sorted(part[x].unique())
            panel.set_xticks(sizes, [str(size) for size in sizes])
        what = f"{value} training steps" if other == "stage" else f"batch size {value}"
        panel.set_title(f"{partition}, {what}")
        panel.set_xlabel("batch size" if x == "batch_size" else "training steps before the attack")
        panel.set_ylim(-0.02, 1.02)
        panel.grid(alpha=0.25)
    axes[0].set_ylabel(title.lower())
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.suptitle(f"{title} (mean over fresh networks, 95% interval)")
    figure.savefig(path, dpi=110)


def _pivot(summary: pd.DataFrame) -> pd.DataFrame:
    """Mean label accuracy, a row a method and a column a batch size, for each partition and stage."""
    table = summary.pivot_table(
        index=["partition", "stage", "method"], columns="batch_size", values="label_accuracy", sort=False
    ).round(3)
    table.columns = [f"B = {size}" for size in table.columns]
    return table.reset_index()
