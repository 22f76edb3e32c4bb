"""Where averaging resists: images behind new weights after local steps, by their number, rate, optimiser and attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fedleak.attacks import Attack, Knowledge, LabelGuess, Run
from fedleak.attacks.inversion.map.attack import image_prior
from fedleak.capture import Observation
from fedleak.config import one_of, whole
from fedleak.data import ImageData, to_float
from fedleak.defenses import NoDefense
from fedleak.errors import UsageError
from fedleak.evaluation.intervals import of_median, wilson
from fedleak.evaluation.label_study import client_update
from fedleak.evaluation.limits import limit_of
from fedleak.evaluation.matching import match
from fedleak.evaluation.metrics import RECOVERED_MSE
from fedleak.federation.scenario import AUXILIARY_IMAGES, load_data
from fedleak.models import build_model
from fedleak.outcome import write_csv
from fedleak.seeding import derive_seed, generator
from fedleak.setup import Setup
from fedleak.studies.base import Job, Study, require
from fedleak.studies.federations import cell_attack
from fedleak.studies.summaries import by_group
from fedleak.threat import ThreatModel
from fedleak.truth import Truth

CONTROL = "noise"
"""The client whose change of the weights is noise of the same size."""

_LIMITED = 8
"""Images up to which the least possible error is computed."""


@dataclass
class LocalSteps(Study):
    """One client a fresh network, which sends its new weights; labels known. The model is the configuration's `model`.

    Args:
        clients: name -> overrides that say how it trains, such as ``[federation.local_steps=5, federation.lr=0.1]``.
        attacks: name -> overrides that choose and set the attack.
        networks: of each client.
        order: ``known`` tells the attack which label belongs to which step, ``unknown`` their counts alone.
        limits: of how many networks of each client the least possible error is computed; of up to eight images.
        fewer: attack -> networks, where `networks` would take too long.
        largest: attack -> images behind an update, at most, for attacks that take too long on more.
    """

    clients: Mapping[str, Sequence[str]]
    attacks: Mapping[str, Sequence[str]]
    networks: int
    order: str = "known"
    limits: int = 0
    fewer: Mapping[str, int] | None = None
    largest: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        self._possible: dict[tuple[str, int], Tensor] = {}
        require("networks", self.networks, whole(1))
        require("order", self.order, one_of("known", "unknown"))
        require("limits", self.limits, whole(0))
        for key, counted in (("fewer", self.fewer), ("largest", self.largest)):
            for attack, count in (counted or {}).items():
                require(f"{key}.{attack}", count, whole(1))
                if attack not in self.attacks:
                    known = ", ".join(self.attacks)
                    raise UsageError(f"study.{key}.{attack}: no such attack here; known: {known}")

    def check(self, job: Job) -> None:
        """The data are there, and there is an attack for every client."""
        data = load_data(job.setup.data)
        build_model(job.setup.model, data.image_shape, data.classes, 0)
        for client in self.clients:
            self._fitting(job, client)

    def run(self, job: Job) -> pd.DataFrame:
        """Write ``results.csv``, a row an image; ``summary.csv`` and ``recovered.png``."""
        data, results = load_data(job.setup.data), job.results()
        cells = [(client, attack) for client in self.clients for attack in self._fitting(job, client)]
        first = next(iter(self.clients))
        cells += [(CONTROL, attack) for attack in self._fitting(job, first)]
        networks = [min(self.networks, (self.fewer or {}).get(attack, self.networks)) for _, attack in cells]
        with job.console.steps("clients", sum(networks)) as advance:
            for (client, name), count in zip(cells, networks, strict=True):
                attack, setup = self._cell(job, first if client == CONTROL else client, name)
                known = self._knowledge(job, data)
                for number in range(count):
                    if not results.take(client=client, attack=name, network=number):
                        results.add(self._attacked(job, data, (client, name, number), attack, setup, known))
                    advance(1, f"{name} on {client}")
        summary = by_group(results.frame, ["client", "attack"], _row)
        write_csv(summary, job.folder / "summary.csv")
        _draw(summary, job)
        return summary

    def _fitting(self, job: Job, client: str) -> list[str]:
        """The attacks that take such a client; raises what the last of them said where none does."""
        found, refused = [], None
        for attack in self.attacks:
            try:
                _, setup = self._cell(job, client, attack)
                samples = setup.federation.local_steps * setup.federation.batch_size
                if samples <= (self.largest or {}).get(attack, samples):
                    found.append(attack)
            except UsageError as error:
                refused = error
        if refused is not None and not found:
            raise refused
        return found

    def _cell(self, job: Job, client: str, attack: str) -> tuple[Attack, Setup]:
        overrides = ["federation=fedavg", *self.clients[client], *self.attacks[attack]]
        return cell_attack(job, f"study.attacks.{attack}", overrides)

    def _knowledge(self, job: Job, data: ImageData) -> Knowledge:
        """Other images of the same kind for the prior."""
        network = build_model(job.setup.model, data.image_shape, data.classes, 0)
        images, labels = to_float(data.test_images[:AUXILIARY_IMAGES]), data.test_labels[:AUXILIARY_IMAGES]
        threat = ThreatModel(auxiliary_data=True, labels=True)
        return Knowledge(network, data.image_shape, data.classes, threat, (images, labels))

    def _attacked(
        self, job: Job, data: ImageData, cell: tuple[str, str, int], attack: Attack, setup: Setup, known: Knowledge
    ) -> list[dict[str, Any]]:
        """The rows of one client's images; a client's network and images are the same for every attack."""
        client, name, number = cell
        observation, truth = self._victim(job, data, client, number, setup)
        labels = truth.labels if self.order == "known" else truth.labels.sort().values
        guess = LabelGuess(labels[None], torch.ones(1))
        (found,) = attack.inversion.invert([observation], [guess], known, Run(job.device, job.seed))
        possible = self._possible.get((client, number))
        if possible is None and client != CONTROL and number < self.limits and len(labels) <= _LIMITED:
            prior = image_prior(known)
            possible = limit_of(observation, truth, known, setup.training, NoDefense(), prior).mse
            self._possible[client, number] = possible
        rows = []
        for image, pair in enumerate(match(found, truth, similarity=False)):
            row = {"client": client, "attack": name, "network": number, "image": image, "mse": pair.mse}
            row |= {"limit_mse": None if possible is None else float(possible[image])}
            rows.append(row | {"evaluations": found.evaluations, "seconds": found.seconds, "stop": found.stop_reason})
        return rows

    def _victim(self, job: Job, data: ImageData, client: str, number: int, setup: Setup) -> tuple[Observation, Truth]:
        network = build_model(
            job.setup.model, data.image_shape, data.classes, derive_seed(job.seed, "local-steps", "model", number)
        )
        steps, size = setup.federation.local_steps, setup.federation.local_steps * setup.federation.batch_size
        random = generator(job.seed, "local-steps", "batch", size, number)
        chosen = torch.randperm(len(data.train_labels), generator=random)[:size]
        images, labels = to_float(data.train_images[chosen]), data.train_labels[chosen]
        seen = client_update(network, images, labels, setup.training, run=number)
        if client == CONTROL:
            draw = {n: torch.randn(v.shape, generator=random) for n, v in seen.update.items()}
            start = seen.parameters
            noise = {n: d * (seen.update[n] - start[n]).norm() / d.norm() for n, d in draw.items()}
            seen = replace(seen, update={n: start[n] + d for n, d in noise.items()})
        return seen, Truth(number + 1, 0, images, labels, steps)


def _row(cell: pd.DataFrame) -> dict[str, Any]:
    """Share of the images recovered with Wilson's interval over images, and the median error."""
    recovered = float((cell["mse"] < RECOVERED_MSE).mean())
    low, high = wilson(recovered, len(cell))
    mse_low, mse_high = of_median(cell["mse"])
    networks = cell.groupby("network").first()
    return {
        "networks": len(networks),
        "images": len(cell),
        "recovered": round(recovered, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "median_mse": _short(cell["mse"].median()),
        "mse_low": _short(mse_low),
        "mse_high": _short(mse_high),
        "limit_mse": _short(cell["limit_mse"].astype(float).median()),
        "evaluations": _short(networks["evaluations"].median()),
        "seconds": _short(networks["seconds"].median()),
    }


def _draw(summary: pd.DataFrame, job: Job) -> None:
    """``recovered.png``: the median error of every attack on every client."""
    clients = list(dict.fromkeys(summary["client"]))
    figure = Figure(figsize=(7.5, 0.5 * len(clients) + 1.6), layout="constrained")
    panel = figure.subplots()
    for number, (attack, rows) in enumerate(summary.groupby("attack", sort=False)):
        places = [clients.index(client) for client in rows["client"]]
        panel.plot(rows["median_mse"], places, "o", color=f"C{number}", label=attack)
    possible = summary.dropna(subset=["limit_mse"])
    if len(possible):
        panel.plot(possible["limit_mse"], [clients.index(c) for c in possible["client"]], "k|", label="possible")
    panel.axvline(RECOVERED_MSE, color="0.4", linewidth=0.8, linestyle=":", label="recovered below")
    panel.set_yticks(range(len(clients)), clients)
    panel.set_xscale("log")
    panel.set_xlabel("median MSE of the images")
    panel.invert_yaxis()
    panel.grid(alpha=0.25)
    panel.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle("Images behind new weights after local training, labels known")
    figure.savefig(job.folder / "recovered.png", dpi=110)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
