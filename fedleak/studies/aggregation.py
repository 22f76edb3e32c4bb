"""What sums and models leak: clients of one image each, seen one by one, as their sum, or as two models in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from fedleak.attacks import Attack, Knowledge
from fedleak.attacks.views import ConsecutiveModels, shown
from fedleak.capture import Observation
from fedleak.config import list_of, whole
from fedleak.data import ImageData, to_float
from fedleak.errors import UsageError
from fedleak.evaluation.intervals import wilson
from fedleak.evaluation.label_study import ONE_STEP, client_update
from fedleak.federation.scenario import AUXILIARY_IMAGES, load_data
from fedleak.models import build_model
from fedleak.outcome import write_csv
from fedleak.seeding import derive_seed, generator
from fedleak.studies.base import Job, Study, require
from fedleak.studies.federations import cell_attack
from fedleak.studies.fresh import judge
from fedleak.studies.summaries import by_group
from fedleak.threat import ThreatModel
from fedleak.truth import Truth

SEEN = ("one client", "sum", "models", "noise")
"""A batch of one client, the sum of clients of one image each, the models before and after their round, and as a
control noise with the norms of that sum's tensors."""


@dataclass
class Aggregation(Study):
    """One step of n clients with one image each, or of one client with all n. The model is the configuration's `model`.

    Args:
        attack: overrides that choose and set it.
        clients: numbers of clients, n.
        networks: fresh ones for each.
        seen: what is compared, of `SEEN`; the control is of the smallest number.
    """

    attack: Sequence[str]
    clients: Sequence[int]
    networks: int
    seen: Sequence[str] = SEEN

    def __post_init__(self) -> None:
        require("networks", self.networks, whole(1))
        require("clients", self.clients, list_of(1))
        for seen in self.seen:
            if seen not in SEEN:
                raise UsageError(f"study.seen={seen}: choose of {', '.join(SEEN)}")

    def check(self, job: Job) -> None:
        """The data are there, and the attack takes the batches."""
        data = load_data(job.setup.data)
        build_model(job.setup.model, data.image_shape, data.classes, 0)
        for count in self.clients:
            self._attack(job, count)

    def run(self, job: Job) -> pd.DataFrame:
        """Write ``results.csv``, a row a batch; ``summary.csv`` and ``aggregation.png``."""
        data, results = load_data(job.setup.data), job.results()
        cells = [(seen, n) for n in self.clients for seen in self.seen if seen != "noise" or n == min(self.clients)]
        with job.console.steps("updates", self.networks * len(cells)) as advance:
            for seen, count in cells:
                attack = self._attack(job, count)
                for number in range(self.networks):
                    if results.take(seen=seen, clients=count, network=number):
                        advance(1, "taken from the earlier run")
                        continue
                    observation, truth, known = self._victims(job, data, seen, count, number)
                    (found,) = attack([observation], known, device=job.device, seed=job.seed)
                    results.add([{"seen": seen, "clients": count, "network": number, **judge(found, truth)}])
                    advance(1, f"{seen} of {count}")
        summary = by_group(results.frame, ["seen", "clients"], _row)
        write_csv(summary, job.folder / "summary.csv")
        _draw(summary, job)
        return summary

    def _attack(self, job: Job, count: int) -> Attack:
        overrides = [*self.attack, "federation=fedsgd", f"federation.batch_size={count}"]
        return cell_attack(job, "study.attack", overrides)[0]

    def _victims(
        self, job: Job, data: ImageData, seen: str, count: int, number: int
    ) -> tuple[Observation, Truth, Knowledge]:
        """What is seen; a network and its images are the same in every view."""
        seed = derive_seed(job.seed, "aggregation", count, number)
        network = build_model(job.setup.model, data.image_shape, data.classes, seed)
        random = generator(job.seed, "aggregation", "images", count, number)
        chosen = torch.randperm(len(data.train_labels), generator=random)[:count]
        images, labels = to_float(data.train_images[chosen]), data.train_labels[chosen]
        auxiliary = to_float(data.test_images[:AUXILIARY_IMAGES]), data.test_labels[:AUXILIARY_IMAGES]
        known = Knowledge(network, data.image_shape, data.classes, ThreatModel(auxiliary_data=True), auxiliary)
        training = replace(ONE_STEP, payload="weights") if seen == "models" else ONE_STEP
        truth = Truth(number + 1, 0, images, labels)
        if seen == "one client":
            return client_update(network, images, labels, training, run=number), truth, known
        each = [
            replace(client_update(network, images[i : i + 1], labels[i : i + 1], training, run=number), client=i)
            for i in range(count)
        ]
        (total,) = shown("sum", each)
        if seen == "models":
            after = [replace(o, round=o.round + 1, parameters=total.update) for o in each]
            (total,) = ConsecutiveModels()([*each, *after])
        if seen == "noise":
            draw = {n: torch.randn(v.shape, generator=random) for n, v in total.update.items()}
            total = replace(total, update={n: d * total.update[n].norm() / d.norm() for n, d in draw.items()})
        return total, truth, known


def _row(cell: pd.DataFrame) -> dict[str, Any]:
    """Labels and images recovered, with Wilson's intervals over all labels and images of the cell."""
    count = len(cell) * int(cell["clients"].iloc[0])
    row: dict[str, Any] = {"networks": len(cell)}
    for name, column in (("labels", "label_accuracy"), ("recovered", "recovered")):
        share = float(cell[column].astype(float).mean())
        low, high = wilson(share, count)
        row |= {name: round(share, 4), f"{name}_low": round(low, 4), f"{name}_high": round(high, 4)}
    row["median_mse"] = float(f"{cell['mse'].median():.4g}")
    return row | {"seconds": float(f"{cell['seconds'].median():.4g}")}


def _draw(summary: pd.DataFrame, job: Job) -> None:
    """``aggregation.png``: images and labels recovered against the number of clients."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for panel, name in zip(figure.subplots(1, 2, sharey=True), ("recovered", "labels"), strict=True):
        for number, (seen, rows) in enumerate(summary.groupby("seen", sort=False)):
            below, above = rows[name] - rows[f"{name}_low"], rows[f"{name}_high"] - rows[name]
            places = rows["clients"] * 1.05**number  # so that intervals stand side by side
            panel.errorbar(places, rows[name], [below, above], fmt="o-", capsize=2, color=f"C{number}", label=seen)
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(summary["clients"].unique()), [str(n) for n in summary["clients"].unique()])
        panel.set_xlabel("clients of one image each")
        panel.set_title("images recovered" if name == "recovered" else "labels right", fontsize=10)
        panel.set_ylim(-0.05, 1.05)
        panel.grid(alpha=0.25)
    panel.legend(fontsize=8, frameon=False)
    figure.savefig(job.folder / "aggregation.png", dpi=110)
