"""Where noise and pruning stop DLG and iDLG, and what they cost: the first defenses that the DLG paper tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fedleak.attacks import Attack, Knowledge, Reconstruction
from fedleak.attacks.inversion.map.attack import image_prior
from fedleak.capture import Observation
from fedleak.config import Rule, is_number, whole
from fedleak.data import ImageData, to_float
from fedleak.defenses import Defense, Gaussian, Laplacian, NoDefense, Pruning
from fedleak.errors import UsageError
from fedleak.evaluation.intervals import normal, wilson
from fedleak.evaluation.limits import limit_of
from fedleak.evaluation.matching import match
from fedleak.evaluation.metrics import RECOVERED_MSE, mse, psnr, ssim
from fedleak.outcome import write_csv
from fedleak.report.pictures import pixels
from fedleak.seeding import generator
from fedleak.setup import named
from fedleak.studies.base import Job, Study, require
from fedleak.studies.captured import Captured
from fedleak.studies.federations import cell_attack, check_cells, run_cells
from fedleak.studies.fresh import draw_victims
from fedleak.studies.named_data import load_named
from fedleak.studies.summaries import by_group, image_summary, spread
from fedleak.threat import ThreatModel
from fedleak.truth import Truth

KEYS = ["attack", "defense", "strength"]
CLEAN, CONTROL, GUESS = "none", "pure noise", "guess"
OVERRIDES = {"gaussian": "std", "laplacian": "scale", "pruning": "ratio"}
"""Defense -> the key of its strength."""
_MOST_DECIBELS = 100.0
"""Of the pictures."""
FORMATS = "formats"
"""The panel of those that are taken as they stand."""
PUBLISHED = {
    "gaussian": ((1e-3, "no"), (1.0, "yes")),
    "laplacian": ((1e-3, "no"), (1.0, "yes")),
    "pruning": ((0.1, "no"), (0.2, "artefacts"), (1.0, "yes")),
    "fp16": ((1.0, "no"),),
    "bf16": ((1.0, "no"),),
    "int8": ((1.0, "yes"),),
}
"""Defense -> whether DLG says that it stops the leak, from memory of its figures: each answer up to its strength."""

_strengths = Rule(
    lambda v: isinstance(v, list) and len(v) > 0 and all(is_number(x) and x > 0 for x in v), "a list of numbers above 0"
)


class PureNoise(Defense):
    """The control: noise alone, of the size of each tensor, so that nothing of the private batch is left."""

    def apply(self, update: dict[str, Tensor], *, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            name: value.square().mean().sqrt() * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            for name, value in update.items()
        }


@dataclass(frozen=True)
class Column:
    """The victims' updates under one defense.

    Attributes:
        name, strength: of the defense.
        known: it, as an attacker who is told of it knows it.
        captured: the updates, and the private images.
        changes: relative ℓ2 distance that each update was moved.
    """

    name: str
    strength: float
    known: Defense
    captured: Captured
    changes: Sequence[float]


@dataclass
class FirstDefenses(Study):
    """Attacks on single defended images, a fresh network each, and the test accuracy of defended federations.

    The model is the configuration's, and the federations are those of its `federation`, for `rounds` rounds. An attack
    that is granted ``threat.defense`` is told of every update's own, one with ``threat.auxiliary_data`` holds the test
    images of `leak_data`.

    Args:
        attacks: name -> overrides, such as ``[attack=dlg, attack.restarts=1]``; each attacks all updates in one call.
        gaussian, laplacian: standard deviations of the noise, of both kinds, in the units of the gradient.
        pruning: fractions of the gradient set to zero.
        victims: private images, and networks.
        leak_data: choice of ``data`` whose images are attacked.
        utility_data: choice of ``data`` that the federations learn.
        roots: data set -> the folder of its files.
        rounds: of each federation; None for none.
        formats: choices of ``defense`` that are taken as they stand, such as ``int8``.
        image_size: height and width of the images that are attacked, None as `leak_data` has them.
        limits: for so many victims the least error anyone could reach, the prior being that of the test images.
        seeds: federations for each strength, from the configuration's seed on.
    """

    attacks: Mapping[str, Sequence[str]]
    gaussian: Sequence[float]
    laplacian: Sequence[float]
    pruning: Sequence[float]
    victims: int
    leak_data: str
    utility_data: str
    roots: Mapping[str, str | None]
    rounds: int | None
    seeds: int
    formats: Sequence[str] = ()
    image_size: int | None = None
    limits: int = 0

    def __post_init__(self) -> None:
        for name in OVERRIDES:
            require(name, getattr(self, name), _strengths)
        for name in ("victims", "seeds"):
            require(name, getattr(self, name), whole(1))
        for name in ("rounds", "image_size"):
            if getattr(self, name) is not None:
                require(name, getattr(self, name), whole(1))
        require("limits", self.limits, whole(0))
        for ratio in self.pruning:
            if ratio >= 1:
                raise UsageError(f"study.pruning={ratio}: must be below 1, the fraction to zero")

    def check(self, job: Job) -> None:
        """The data are there, the attacks can be made of their overrides, and the federations can run."""
        self._leaked(job)
        self._defenses(job)
        for name in self.attacks:
            self._attack(job, name)
        for _ in check_cells(job, self._cells(job)):
            pass

    def run(self, job: Job) -> pd.DataFrame:
        """Write ``results.csv``, ``utility.csv``, ``summary.csv`` and the pictures."""
        data = self._leaked(job)
        clean = draw_victims(data, job.setup.model, range(self.victims), 1, ThreatModel(), job.seed)
        columns = self._defended(clean, job)
        auxiliary = to_float(data.test_images), data.test_labels
        held = replace(clean.knowledge, auxiliary=auxiliary)
        results = job.results()
        results.add(_guesses(clean, data.classes, job.seed))
        for name in self.attacks:
            attack, threat = self._attack(job, name)
            known = replace(held, threat=threat, auxiliary=auxiliary if threat.auxiliary_data else None)
            images = []
            with job.console.steps(name, len(columns)) as advance:
                for column in columns:
                    kept = job.folder / "images" / f"{name}-{column.name}-{column.strength:g}.npy"
                    where = {"attack": name, "defense": column.name, "strength": column.strength}
                    if not kept.exists() or results.take(**where) < self.victims:
                        told = replace(known, defense=column.known if threat.defense else None)
                        found = attack(column.captured.observations, told, device=job.device, seed=job.seed)
                        limits = self._limits(column, held, results.rows)
                        kept.parent.mkdir(exist_ok=True)
                        rebuilt = torch.stack([one.images[0].float() for one in found])
                        np.save(kept, rebuilt.numpy())
                        results.add(_judged(where, column, found, limits))
                    images.append(torch.from_numpy(np.load(kept)))
                    advance(1, column.name)
            _grid(clean.truths, images, [(c.name, c.strength) for c in columns], name, job.folder / f"{name}.png")
        results.add([])

        utility = job.results("utility.csv")
        places = self._places(job)
        for name, outcome in run_cells(job, self._cells(job)):
            place = dict(zip(("defense", "strength", "seed"), places[name], strict=True))
            utility.add([place | {"test_accuracy": outcome.summary["final_test_accuracy"]}])
        summary = _summarise(results.frame, utility.frame)
        verdicts = [_published(*row) for row in summary[KEYS[1:]].to_numpy()]
        summary["published"] = pd.Series(verdicts, dtype=object)
        write_csv(summary, job.folder / "summary.csv")
        _draw(summary, self.leak_data, self.utility_data, self.formats, job.folder / "first_defenses.png")
        shown = [*KEYS, "published", "change", "label_accuracy", "recovered", "mse", "limit_mse", "psnr", "ssim"]
        return summary[[*shown, "test_accuracy"]]

    def _leaked(self, job: Job) -> ImageData:
        """The images that are attacked."""
        return load_named([self.leak_data], self.roots, job.overrides, size=self.image_size)[self.leak_data]

    def _defenses(self, job: Job) -> list[tuple[str, float, Defense]]:
        """(name, strength, defense) of every column of the study, the clean update and the control among them."""
        made: list[tuple[str, float, Defense]] = [(CLEAN, 0.0, NoDefense())]
        made += [("gaussian", std, Gaussian(std)) for std in self.gaussian]
        # A Laplacian's standard deviation is √2 times its scale: equal numbers mean equal noise.
        made += [("laplacian", std, Laplacian(std / 2**0.5)) for std in self.laplacian]
        made += [("pruning", ratio, Pruning(ratio)) for ratio in self.pruning]
        parts = named("defense", list(self.formats), job.overrides, "study.formats")
        made += [(name, 1.0, part.build(Defense)) for name, part in parts.items()]
        return [*made, (CONTROL, 1.0, PureNoise())]

    def _defended(self, clean: Captured, job: Job) -> list[Column]:
        """Every victim's update under every defense, numbered as clients, and the relative ℓ2 distance it was moved."""
        columns = []
        for number, (name, strength, defense) in enumerate(self._defenses(job)):
            observations: list[Observation] = []
            changes = []
            for observation in clean.observations:
                random = generator(job.seed, "defense", name, str(strength), observation.round)
                update = defense.apply(dict(observation.update), generator=random)
                observations.append(replace(observation, client=number, update=update))
                moved = {n: update[n] - value for n, value in observation.update.items()}
                changes.append(_norm(moved) / _norm(observation.update))
            truths = [replace(truth, client=number) for truth in clean.truths]
            known = NoDefense() if name == CONTROL else defense
            captured = replace(clean, observations=observations, truths=truths)
            columns.append(Column(name, strength, known, captured, changes))
        return columns

    def _limits(
        self, column: Column, knowledge: Knowledge, rows: Sequence[Mapping[str, Any]]
    ) -> Mapping[int, float | None]:
        """Victim -> the least mean squared error, of the first `limits` of them; from `rows` where it stands there."""
        if column.name == CONTROL or not self.limits:
            return {}
        here = [row for row in rows if (row["defense"], row["strength"]) == (column.name, column.strength)]
        if here:
            return {row["victim"]: row["limit_mse"] for row in here}
        prior, captured = image_prior(knowledge), column.captured
        pairs = list(zip(captured.observations, captured.truths, strict=True))[: self.limits]
        found = (limit_of(sent, truth, knowledge, sent.training, column.known, prior) for sent, truth in pairs)
        return {victim: float(least.mse[0]) for victim, least in enumerate(found)}

    def _attack(self, job: Job, name: str) -> tuple[Attack, ThreatModel]:
        overrides = ["federation=fedsgd", *self.attacks[name], "federation.batch_size=1"]
        attack, setup = cell_attack(job, f"study.attacks.{name}", overrides)
        return attack, setup.threat

    def _places(self, job: Job) -> dict[str, tuple[str, float, int]]:
        """Cell's name -> defense, strength, seed."""
        return {
            f"{name} {strength} seed-{seed}": (name, strength, seed)
            for name, strength, _ in self._defenses(job)
            if name != CONTROL and self.rounds is not None
            for seed in range(job.seed, job.seed + self.seeds)
        }

    def _cells(self, job: Job) -> dict[str, list[str]]:
        root = self.roots.get(self.utility_data)
        data = [f"data={self.utility_data}", *([] if root is None else [f"data.root='{root}'"])]
        once = [f"federation.{key}={self.rounds}" for key in ("rounds", "evaluate_every", "capture_every")]
        return {
            cell: [*data, *once, "attack=none", *_override(name, strength), f"seed={seed}"]
            for cell, (name, strength, seed) in self._places(job).items()
        }


def _judged(
    where: Mapping[str, Any], column: Column, found: Sequence[Reconstruction], limits: Mapping[int, float | None]
) -> list[dict[str, Any]]:
    """A row a victim of ``results.csv``."""
    rows = []
    for victim, (one, truth, change) in enumerate(zip(found, column.captured.truths, column.changes, strict=True)):
        pair = match(one, truth)[0]
        rows.append(
            {**where, "victim": victim, "label_right": pair.label_true == pair.label_inferred, "change": change}
            | {key: getattr(pair, key) for key in ("mse", "psnr", "ssim", "recovered")}
            | {"objective": one.objective, "evaluations": one.evaluations, "stop_reason": one.stop_reason}
            | {"limit_mse": limits.get(victim)}
        )
    return rows


def _published(defense: str, strength: float) -> str | None:
    """DLG's own verdict: whether a defense stops the leak at this strength; None of one that it did not try."""
    answers = PUBLISHED.get(defense, ())
    return next((answer for most, answer in answers if strength <= most), None)


def _override(name: str, strength: float) -> list[str]:
    if name == CLEAN:
        return ["defense=none"]
    if name not in OVERRIDES:
        return [f"defense={name}"]
    return [f"defense={name}", f"defense.{OVERRIDES[name]}={strength / 2**0.5 if name == 'laplacian' else strength}"]


def _norm(update: Mapping[str, Tensor]) -> float:
    return float(sum(float(value.double().square().sum()) for value in update.values())) ** 0.5


def _guesses(victims: Captured, classes: int, seed: int) -> list[dict[str, Any]]:
    """What is worth nothing: a grey image with a random label."""
    rows = []
    for truth in victims.truths:
        grey = torch.full_like(truth.images, 0.5)
        label = int(torch.randint(classes, (), generator=generator(seed, "guess", truth.round)))
        rows.append(
            {"attack": GUESS, "defense": GUESS, "strength": 0.0, "victim": truth.round - 1}
            | {"label_right": label == int(truth.labels[0]), "mse": float(mse(truth.images, grey)), "recovered": False}
            | {"psnr": float(psnr(truth.images, grey)), "ssim": float(ssim(truth.images, grey))}
        )
    return rows


def _summarise(results: pd.DataFrame, utility: pd.DataFrame) -> pd.DataFrame:
    """A row an attack and strength: leakage with 95% intervals over victims, test accuracy over seeds."""

    def cost(group: pd.DataFrame) -> dict[str, float]:
        low, high = normal(group["test_accuracy"])
        return {"test_accuracy": group["test_accuracy"].mean(), "accuracy_low": low, "accuracy_high": high}

    def leak(group: pd.DataFrame) -> dict[str, float]:
        share = float(group["label_right"].astype(float).mean())
        low, high = wilson(share, len(group))
        labels = {"label_accuracy": round(share, 4), "label_low": round(low, 4), "label_high": round(high, 4)}
        change, evaluations = group["change"].median(), group["evaluations"].median()
        possible = pd.to_numeric(group["limit_mse"], errors="coerce").median()
        return labels | {"change": float(f"{change:.4g}"), "evaluations": evaluations, "limit_mse": possible}

    table = by_group(results, KEYS, leak).merge(image_summary(results, KEYS), on=KEYS)
    if not len(utility):
        return table.assign(**dict.fromkeys(("test_accuracy", "accuracy_low", "accuracy_high"), np.nan))
    return table.merge(by_group(utility, KEYS[1:], cost).round(4), on=KEYS[1:], how="left")


def _short(defense: str, strength: float) -> str:
    if defense == "pruning":
        return f"{strength:.0%}"
    return f"{strength:.0e}".replace("e-0", "e-") if defense in OVERRIDES else ""


def _grid(
    truths: Sequence[Truth],
    rebuilt: Sequence[Tensor],
    columns: Sequence[tuple[str, float]],
    attack: str,
    path: Path,
    most: int = 6,
) -> None:
    """The first victims, a row each: the private image, then what was rebuilt under each defense."""
    truths = truths[:most]
    size = 0.72
    figure = Figure(figsize=(size * (len(columns) + 1) + 0.3, size * len(truths) + 0.95), layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(truths), len(columns) + 1))
    for row, truth in enumerate(truths):
        for column in range(len(columns) + 1):
            panel, true = axes[row, column], truth.images[0]
            image = true if column == 0 else rebuilt[column - 1][row]
            panel.imshow(pixels(image))
            panel.set(xticks=[], yticks=[])
            leaked = column > 0 and float(mse(true[None], image[None])) < RECOVERED_MSE
            for spine in panel.spines.values():
                spine.set(color="#c03a06" if leaked else "#c9ced6", linewidth=2 if leaked else 0.5)
            if row == 0:
                title = "true" if column == 0 else "\n".join((columns[column - 1][0], _short(*columns[column - 1])))
                panel.set_title(title, fontsize=7)
    figure.suptitle(f"{attack}: rebuilt from defended updates (framed: mean squared error below 1e-3)", fontsize=10)
    figure.savefig(path, dpi=80)  # noise does not compress: 110 would make 1.3 MB


def _draw(summary: pd.DataFrame, leak_data: str, utility_data: str, formats: Sequence[str], path: Path) -> None:
    """A column a defense: what leaks and what is learnt against its strength; below, how close the images came."""
    shown = [*OVERRIDES, *([FORMATS] if formats else [])]
    figure = Figure(figsize=(14, 7.6), layout="constrained")
    panels = figure.subplots(2, len(shown), sharey="row")
    attacks = [name for name in dict.fromkeys(summary["attack"]) if name != GUESS]
    colors = dict(zip(attacks, ("#0f766e", "#c2410c", "C4", "C5", "C6"), strict=False))
    guess = summary[summary["attack"] == GUESS].iloc[0]
    for (above, below), defense in zip(panels.T, shown, strict=True):
        part = summary[summary["defense"].isin([CLEAN, *(formats if defense == FORMATS else [defense])])]
        first = part[part["attack"] == attacks[0]]
        places = np.arange(len(first))
        for i, attack in enumerate(attacks):
            mine, shifted = part[part["attack"] == attack], places + 0.12 * (i - (len(attacks) - 1) / 2)
            look = {"marker": "o", "markersize": 4, "capsize": 2, "color": colors[attack]}
            above.errorbar(
                shifted, mine["recovered"], spread(mine, "recovered", "low", "high"),
                label=f"{attack}: images recovered", **look,
            )  # fmt: skip
            above.errorbar(
                shifted, mine["label_accuracy"], spread(mine, "label_accuracy", "label_low", "label_high"),
                linestyle=":", label=f"{attack}: labels right", **look,
            )  # fmt: skip
            below.errorbar(shifted, mine["psnr"], spread(mine, "psnr", "psnr_low", "psnr_high"), **look)
        if first["limit_mse"].notna().any():
            possible = -10 * np.log10(first["limit_mse"].astype(float))
            below.plot(places, possible.clip(upper=_MOST_DECIBELS), "k--", label="limit", linewidth=1)
        above.errorbar(
            places, first["test_accuracy"], spread(first, "test_accuracy", "accuracy_low", "accuracy_high"),
            color="#1d4ed8", marker="s", markersize=4, linewidth=2, capsize=2, label=f"test accuracy on {utility_data}",
        )  # fmt: skip
        below.axhline(guess["psnr"], color="0.5", linestyle=":", linewidth=1)
        names = [_short(name, strength) or name for name, strength in first[KEYS[1:]].to_numpy()]
        for panel in (above, below):
            panel.set_xticks(places, names)
            panel.grid(alpha=0.25)
        scale = {"pruning": "pruning: fraction set to zero", FORMATS: "formats"}
        above.set_title(scale.get(defense, f"{defense}: standard deviation"))
        above.set_ylim(-0.02, 1.02)
        below.set_ylim(bottom=0)
    panels[1, 0].set_ylabel("median PSNR, dB (dotted: a grey image; dashed: the limit)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"What defenses stop on {leak_data} images, and what they cost (bars: 95% intervals)")
    figure.savefig(path, dpi=100)
