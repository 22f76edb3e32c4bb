"""Which method reads the labels off an update best, by batch size, skew and stage of training.

``fedleak labels`` starts it with settings of its own, ``fedleak run experiment=label_inference`` as one of the studies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from fedleak.attacks.base import Knowledge, LabelInference
from fedleak.attacks.labels.last_layer import find_last_layer
from fedleak.config import Rule, check_rules, conf_dir, is_number, whole
from fedleak.data import to_float
from fedleak.errors import UsageError
from fedleak.evaluation.intervals import normal, wilson
from fedleak.evaluation.label_study import ClientPlan, Partition, client_update, draw_batch, label_study
from fedleak.federation.scenario import load_data
from fedleak.instantiate import instantiate
from fedleak.models import build_model
from fedleak.pipeline import write_csv
from fedleak.seeding import derive_seed, generator
from fedleak.studies.base import Job, Study, list_of

CONTROL = "random"
OURS = "fedleak"


PLAN = {
    "labels.methods": Rule(
        lambda v: isinstance(v, list) and len(v) > 0 and all(isinstance(x, str) for x in v),
        "a list of choices of attack/labels",
    ),
    "labels.batch_sizes": list_of(1),
    "labels.stages": list_of(0),
    "labels.runs": whole(1),
}
RULES = {
    **PLAN,
    "federation.payload": Rule(lambda v: v in ("gradient", "weights"), "gradient or weights"),
    "federation.local_steps": whole(1),
    "federation.lr": Rule(lambda v: is_number(v) and v > 0, "a number above 0"),
    "seed": whole(0),
}


class LabelInferenceStudy(Study):
    """The study of this module with batches drawn both iid and biased.

    What victims do with their batches is the configuration's `federation`.

    Args:
        methods: choices of ``attack/labels``.
        batch_sizes: samples per local step.
        stages: training steps before the attack.
        runs: networks.
    """

    def __init__(self, methods: Sequence[str], batch_sizes: Sequence[int], stages: Sequence[int], runs: int) -> None:
        self.settings = {"methods": methods, "batch_sizes": batch_sizes, "stages": stages, "runs": runs}
        check_rules({"study": self.settings}, {key.replace("labels.", "study."): rule for key, rule in PLAN.items()})
        for name in methods:
            load_method(name, "study.methods")

    def check(self, job: Job) -> None:
        """The data are there."""
        load_data(job.config["data"])

    def run(self, job: Job) -> pd.DataFrame:
        """Write ``labels.csv``, ``summary.csv`` and the pictures; returns the mean label accuracies."""
        federation = {key: job.config["federation"][key] for key in ("payload", "local_steps", "lr")}
        config = {**job.config, "labels": self.settings, "federation": federation, "partition": None}
        with job.console.cells("label inference", cells(config)) as on_cell:
            return pivot(run(config, job.folder, on_cell))


def cells(config: Mapping[str, Any]) -> int:
    """How many cells `run` will report, at most."""
    plan = config["labels"]
    return len(plan["methods"]) * len(plan["batch_sizes"]) * len(plan["stages"]) * len(partitions(config))


def check(config: Mapping[str, Any]) -> dict[str, LabelInference]:
    """Check every value and build the methods; raises `UsageError` naming key, value and mend."""
    check_rules(config, RULES)
    partitions(config)
    return {name: load_method(name, "labels.methods") for name in config["labels"]["methods"]}


def partitions(config: Mapping[str, Any]) -> list[Partition]:
    """How victims' batches are drawn: the chosen `partition`, both if none is."""
    node = config.get("partition")
    if node is None:
        return ["iid", "biased"]
    name = str(node["_target_"]).rsplit(".", 1)[-1].lower()
    if name not in ("iid", "biased"):
        raise UsageError(f"partition={name}: fedleak labels draws batches iid or biased; leave it out for both")
    return [name]  # type: ignore[list-item]


def load_method(name: str, key: str) -> LabelInference:
    """The choice `name` of ``attack/labels``; raises `UsageError` that names `key` where there is none."""
    folder = conf_dir() / "attack" / "labels"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise UsageError(f"{key}={name}: no such method; choices: {known}")
    return instantiate(OmegaConf.to_container(OmegaConf.load(path)), f"{key}.{name}")


def run(config: Mapping[str, Any], folder: Path, on_cell: Any = None) -> pd.DataFrame:
    """Run the study; write `labels.csv`, `summary.csv` and the pictures. Returns the summary.

    Args:
        config: plain containers of ``conf/labels.yaml``.
        folder: where to write.
        on_cell: called with (method, partition, stage, batch size, mean label accuracy).
    """
    methods = check(config)
    data = load_data(config["data"])
    images = to_float(torch.cat([data.train_images, data.test_images]))
    labels = torch.cat([data.train_labels, data.test_labels])
    plan = ClientPlan(**config["federation"])
    drawn = partitions(config)

    def network(run: int) -> torch.nn.Module:
        return build_model(config["model"], data.image_shape, data.classes, derive_seed(config["seed"], "model", run))

    name = str(config["data"]["_target_"]).rsplit(".", 1)[-1]
    frame = label_study(
        images,
        labels,
        model=network,
        methods=methods,
        batch_sizes=config["labels"]["batch_sizes"],
        partitions=drawn,
        stages=config["labels"]["stages"],
        runs=config["labels"]["runs"],
        data=name,
        plan=plan,
        seed=config["seed"],
        on_cell=on_cell,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(frame, folder / "labels.csv")
    summary = summarise(frame)
    write_csv(summary, folder / "summary.csv")
    _lines(summary, "batch_size", "label_accuracy", "Labels inferred rightly", folder / "accuracy.png")
    _lines(summary, "batch_size", "labels_exact", "Whole batch right", folder / "whole_batch.png")
    if summary["stage"].nunique() > 1:
        _lines(summary, "stage", "label_accuracy", "Labels inferred rightly", folder / "stages.png")
    _scatter(network, images, labels, plan, drawn, config, folder / "gradient_against_count.png")
    return summary


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a method, partition, stage and batch size: means over runs with 95% intervals.

    Label accuracy has a normal interval over networks, the whole-batch rate a Wilson interval.
    """
    rows = []
    keys = ["method", "data", "partition", "stage", "batch_size"]
    for key, group in frame.groupby(keys, sort=False):
        runs, mean = len(group), group.label_accuracy.mean()
        low, high = normal(group.label_accuracy)
        exact = group.labels_exact.mean()
        exact_low, exact_high = wilson(exact, runs)
        rows.append(
            dict(zip(keys, key, strict=True))
            | {"runs": runs, "label_accuracy": mean, "low": max(0.0, low), "high": min(1.0, high)}
            | {"labels_exact": exact, "exact_low": exact_low, "exact_high": exact_high}
            | {"counts_exact": group.counts_exact.mean(), "seconds": group.seconds.mean()}
        )
    return pd.DataFrame(rows).round(6)


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
            color = {OURS: "#c2410c", CONTROL: "0.5"}.get(name, f"C{i % 10}")
            dashes = ":" if name == CONTROL else "--" if i >= 10 and name != OURS else "-"
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


def _scatter(
    network: Any,
    images: torch.Tensor,
    labels: torch.Tensor,
    plan: ClientPlan,
    drawn: list[Partition],
    config: Mapping[str, Any],
    path: Path,
) -> None:
    """What every counting method lives on: a class's gradient, summed over its inputs, against its count."""
    size = max(s for s in config["labels"]["batch_sizes"] if s <= len(labels))
    known = Knowledge(network(0), tuple(images.shape[1:]), int(labels.max()) + 1)  # type: ignore[arg-type]
    figure = Figure(figsize=(5.2 * len(drawn) + 0.5, 4.0), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(drawn), sharey=True))
    for panel, partition in zip(panels, drawn, strict=True):
        for run in range(min(10, config["labels"]["runs"])):
            random = generator(config["seed"], "scatter", partition, run)
            batch = draw_batch(labels, size * plan.local_steps, partition, random)
            model = network(run)
            observation = client_update(model, images[batch], labels[batch], plan, run=run, batch_size=size)
            sums = observation.gradient()[find_last_layer(known).weight].sum(dim=1)
            counts = torch.bincount(labels[batch], minlength=len(sums))
            panel.scatter(counts + 0.1 * torch.rand(len(counts)) - 0.05, sums, s=9, alpha=0.6, color="#1d4ed8")
        panel.axhline(0, color="0.6", linewidth=0.8)
        panel.set_title(f"{partition}, batch size {size}, untrained")
        panel.set_xlabel("samples of the class in the batch")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("gradient of the class, summed over inputs")
    figure.savefig(path, dpi=110)


def pivot(summary: pd.DataFrame) -> pd.DataFrame:
    """Mean label accuracy, a row a method and a column a batch size, for each partition and stage."""
    table = summary.pivot_table(
        index=["partition", "stage", "method"], columns="batch_size", values="label_accuracy", sort=False
    ).round(3)
    table.columns = [f"B = {size}" for size in table.columns]
    return table.reset_index()
