"""``fedleak condense``: a data set in a few made images, how well networks learn from them, and whom they resemble."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fedleak.condensation import FILE, Condensed, Progress, Recipe, Trainer, condense, save_condensed
from fedleak.condensation.store import load_progress, save_progress
from fedleak.config import POSITIVE, YES_NO, Rule, is_number, list_of, one_of, whole
from fedleak.data import ImageData, to_float
from fedleak.errors import UsageError
from fedleak.evaluation.intervals import student
from fedleak.federation.scenario import load_data
from fedleak.instantiate import Part
from fedleak.models import build_model
from fedleak.outcome import write_csv
from fedleak.report.pictures import pixels
from fedleak.seeding import derive_seed, generator
from fedleak.studies.base import Job, Study, require
from fedleak.studies.summaries import by_group

PUBLISHED = {
    "mnist": {1: 0.917, 10: 0.974, 50: 0.988},
    "fashion_mnist": {1: 0.705, 10: 0.823, 50: 0.836},
    "svhn": {1: 0.312, 10: 0.761, 50: 0.823},
    "cifar10": {1: 0.283, 10: 0.449, 50: 0.539},
}
"""Data set -> images a class -> test accuracy (Zhao, Mopuri and Bilen 2021, table 1)."""

MOST_SHOWN = 10
"""Images of a class in the picture."""

UNFINISHED = "unfinished"
"""Folder with what an interrupted run goes on from."""

SECONDS = 10.0
"""Between two writings of that."""

Known = tuple[Tensor, Tensor, Tensor, Tensor]
"""Images and labels to train on, images and labels to test on."""


@dataclass
class Condensation(Study):
    """Condense, train fresh networks on the result, and compare with as many real images drawn at random.

    The network is the configuration's `model`; where it does not normalise, the data's mean and standard deviation do.

    Args:
        images_per_class: a number or several.
        networks, matches, train_epochs, batch_size, lr, momentum, start: see `fedleak.condensation.Recipe`.
        bounded: keep the images in [0, 1].
        seeds: how often the data set is condensed, from the configuration's seed on.
        evaluations: fresh networks trained on each set.
        epochs, augment: of that training, see `fedleak.condensation.Trainer`.
        judge_width: the ``model.width`` of those networks, None for that of the networks that were matched on.
        key: where the settings stand in the configuration, for error messages.
    """

    images_per_class: int | Sequence[int]
    networks: int
    matches: int | None
    train_epochs: int | None
    batch_size: int
    lr: float
    momentum: float
    start: Literal["noise", "real"]
    bounded: bool
    seeds: int
    evaluations: int
    epochs: int
    augment: bool
    judge_width: int | None = None
    key: str = "study"

    def __post_init__(self) -> None:
        share = Rule(lambda v: is_number(v) and 0 <= v < 1, "a number from 0, below 1")
        none_or = Rule(lambda v: v is None or whole(1).test(v), "null or a whole number from 1")
        rules = {"networks": whole(1), "matches": none_or, "train_epochs": none_or, "batch_size": whole(1)}
        rules |= {"lr": POSITIVE, "momentum": share, "start": one_of("noise", "real"), "bounded": YES_NO}
        rules |= {"seeds": whole(1), "evaluations": whole(1), "epochs": whole(1), "augment": YES_NO}
        rules |= {"judge_width": none_or}
        counts = whole(1) if isinstance(self.images_per_class, int) else list_of(1)
        for name, rule in {"images_per_class": counts, **rules}.items():
            require(name, getattr(self, name), rule, self.key)

    def check(self, job: Job) -> None:
        """The data are there, with enough images of every class, and the model takes them."""
        data = load_data(job.setup.data)
        fewest = int(torch.bincount(data.train_labels, minlength=data.classes).min())
        if fewest < max(self._counts):
            raise UsageError(
                f"{self.key}.images_per_class={self.images_per_class}: a class of data={data.name} has {fewest} "
                "images; ask for no more than that"
            )
        _network(job.setup.model, data, 0)
        _network(self._judge(job.setup.model), data, 0)

    def run(self, job: Job) -> pd.DataFrame:
        """Write ``results.csv``, ``summary.csv``, ``nearest.csv``, the images and their picture."""
        data, results, resembled = load_data(job.setup.data), job.results(), job.results("nearest.csv")
        images, test_images = (to_float(v).to(job.device) for v in (data.train_images, data.test_images))
        known = images, data.train_labels.to(job.device), test_images, data.test_labels.to(job.device)
        steps = len(self._counts) * self.seeds * (self.networks + 2 * self.evaluations)
        with job.console.steps("condensation", steps) as advance:
            for count in self._counts:
                for seed in range(job.seed, job.seed + self.seeds):
                    made = self._condensed(job, data, known, count, seed, advance)
                    where = {"data": data.name, "images_per_class": count, "seed": seed}
                    for name, pairs in made.items():
                        for number in range(self.evaluations):
                            place = {**where, "set": name, "network": number}
                            if not results.take(**place):
                                accuracy = self._judged(job, data, pairs, known, seed, number)
                                results.add([{**place, "test_accuracy": accuracy}])
                            advance(1, f"{name}, {count} a class: {results.rows[-1]['test_accuracy']:.1%}")
                    if not resembled.take(**where):
                        resembled.add({**where, **row} for row in nearest(*made["condensed"], images, test_images))
                    if seed == job.seed:
                        _save(job, data, count, made["condensed"], alone=len(self._counts) == 1)
        summary = summarise(results.frame, resembled.frame)
        write_csv(summary, job.folder / "summary.csv")
        shutil.rmtree(job.folder / UNFINISHED, ignore_errors=True)  # nothing is left to go on with
        return summary[["data", "images_per_class", "set", "test_accuracy", "low", "high", "published"]]

    @property
    def _counts(self) -> list[int]:
        return [self.images_per_class] if isinstance(self.images_per_class, int) else list(self.images_per_class)

    def _judge(self, model: Part) -> Part:
        """The model of the networks that judge."""
        return model if self.judge_width is None else Part("model", {**model.node, "width": self.judge_width})

    def _judged(
        self, job: Job, data: ImageData, made: tuple[Tensor, Tensor], known: Known, seed: int, number: int
    ) -> float:
        """The test accuracy of a fresh network that was trained on made images."""
        model = _network(self._judge(job.setup.model), data, derive_seed(seed, "evaluation", number))
        trainer = Trainer(self.epochs, augment=self.augment)
        return trainer.accuracy(model.to(job.device), *made, *known[2:], seed=derive_seed(seed, "train", number))

    def _condensed(
        self,
        job: Job,
        data: ImageData,
        known: Known,
        count: int,
        seed: int,
        advance: Callable[[int, str], None],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The condensed images and labels, and as many real ones."""
        images, labels = known[:2]
        names = ("networks", "matches", "train_epochs", "batch_size", "lr", "momentum", "start")
        recipe = Recipe(count, **{name: getattr(self, name) for name in names})

        def network(number: int) -> nn.Module:
            return _network(job.setup.model, data, derive_seed(seed, "condense", number)).to(job.device)

        path = job.folder / UNFINISHED / f"{count}_per_class-seed-{seed}.safetensors"
        since = load_progress(path) if job.resume else None
        advance(0 if since is None else since.networks, f"{count} a class")
        written = time.monotonic()

        def tell(progress: Progress, distance: float) -> None:
            nonlocal written
            if progress.networks == self.networks or time.monotonic() - written > SECONDS:
                save_progress(path, progress)
                written = time.monotonic()
            advance(1, f"{count} a class: distance {distance:.2f}")

        options: dict[str, Any] = {"seed": seed, "bounded": self.bounded, "since": since, "on_network": tell}
        made = condense(images, labels, data.classes, recipe, network, **options)
        random, chosen = generator(seed, "random images", count), []
        for label in range(data.classes):
            own = (labels == label).nonzero().squeeze(1)
            chosen.append(own[torch.randperm(len(own), generator=random)[:count]])
        return {"condensed": made, "random": (images[torch.cat(chosen)], labels[torch.cat(chosen)])}


def nearest(images: Tensor, labels: Tensor, private: Tensor, others: Tensor) -> list[dict[str, Any]]:
    """How near each image is to the private images it was made from, and to as many that it was not made from.

    Args:
        images, labels: ``[N, C, H, W]`` and ``[N]``.
        private, others: ``[M, C, H, W]`` and ``[K, C, H, W]``; of both, the first min(M, K) count.

    Returns:
        Rows with the least mean squared errors, `nearest_private_mse` and `nearest_other_mse`.
    """
    fewest, rows = min(len(private), len(others)), []
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        errors = [float((some[:fewest] - image).square().flatten(1).mean(1).min()) for some in (private, others)]
        near = {"nearest_private_mse": errors[0], "nearest_other_mse": errors[1]}
        rows.append({"image": number, "label": label} | {name: float(f"{value:.4g}") for name, value in near.items()})
    return rows


def summarise(results: pd.DataFrame, resembled: pd.DataFrame) -> pd.DataFrame:
    """A row a data set, number of images and kind of set: accuracy with its 95% interval, the published one beside it.

    The condensed sets' rows also have the medians of `nearest`.
    """
    near = resembled.groupby(["data", "images_per_class"])[["nearest_private_mse", "nearest_other_mse"]].median()

    def row(group: pd.DataFrame) -> dict[str, Any]:
        low, high = student(group["test_accuracy"])
        data, count, made = group.iloc[0][["data", "images_per_class", "set"]]
        published = PUBLISHED.get(data, {}).get(count, np.nan) if made == "condensed" else np.nan
        values = {"networks": len(group), "test_accuracy": round(group["test_accuracy"].mean(), 4)}
        values |= {"low": round(max(0.0, low), 4), "high": round(min(1.0, high), 4), "published": published}
        return values | (near.loc[(data, count)].to_dict() if made == "condensed" else {})

    return by_group(results, ["data", "images_per_class", "set"], row)


def _network(model: Part, data: ImageData, seed: int) -> nn.Module:
    """A fresh network, which sees the data with mean 0 and standard deviation 1."""
    settings = dict(model.node)
    if settings.get("normalize") is None:
        images = to_float(data.train_images[:10_000])
        settings["normalize"] = {"mean": images.mean((0, 2, 3)).tolist(), "std": images.std((0, 2, 3)).tolist()}
    return build_model(Part("model", settings), data.image_shape, data.classes, seed)


def _save(job: Job, data: ImageData, count: int, made: tuple[Tensor, Tensor], *, alone: bool) -> None:
    """``condensed.safetensors`` and its picture; where several numbers of images are made, in a folder each."""
    folder = job.folder if alone else job.folder / f"{count}_per_class"
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = (value.cpu() for value in made)
    node = dict(job.setup.data.node)
    if node.get("root") is not None:
        node["root"] = str(Path(node["root"]).expanduser().absolute())  # the file may be read from another place
    save_condensed(folder / FILE, Condensed(images, labels, data.class_names, node))
    _picture(images, labels, data.class_names, folder / "condensed.png")


def _picture(images: Tensor, labels: Tensor, class_names: Sequence[str], path: Path) -> None:
    """A column a class, with at most `MOST_SHOWN` of its images."""
    classes = min(len(class_names), 20)
    rows = min(MOST_SHOWN, int((labels == 0).sum()))
    figure = Figure(figsize=(0.8 * classes, 0.8 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, classes, squeeze=False)
    for column in range(classes):
        own = images[labels == column]
        grid[0, column].set_title(class_names[column], size=8)
        for row in range(rows):
            grid[row, column].imshow(pixels(own[row]), interpolation="nearest")
            grid[row, column].set_axis_off()
    figure.savefig(path, dpi=110)
