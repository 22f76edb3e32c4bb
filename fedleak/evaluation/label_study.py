"""Label inference compared: methods × batch sizes × partitions × stages, with a fresh network in every run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from fedleak.attacks.base import Knowledge, LabelInference, Run
from fedleak.capture import Observation
from fedleak.errors import UsageError
from fedleak.local_update import local_update
from fedleak.threat import ThreatModel
from fedleak.training import SGD, LocalTraining

COLUMNS = ["method", "data", "partition", "stage", "batch_size", "run"]
COLUMNS += ["label_accuracy", "labels_exact", "counts_exact", "seconds"]

Partition = Literal["iid", "biased", "different"]


ONE_STEP = LocalTraining(local_steps=1, optimizer=SGD(0.1))
"""One step, whose gradient is sent."""


def draw_batch(labels: Tensor, size: int, partition: Partition, generator: torch.Generator) -> Tensor:
    """``[size]`` int64, which samples are in a victim's batch.

    `iid` draws without replacement (with it, where there are fewer samples than `size`); `biased` is the founding
    study's skew: half of the batch one class, a quarter a second one, the rest at random from the other classes;
    `different` draws no class twice.
    """
    if partition == "iid":
        return _draw(torch.arange(len(labels)), size, generator)
    if partition == "different":
        order = torch.randperm(len(labels), generator=generator)
        firsts = {label: place for place, label in reversed(list(enumerate(labels[order].tolist())))}
        if len(firsts) < size:
            raise UsageError(f"partition=different needs {size} classes and the data have {len(firsts)}; choose iid")
        return order[sorted(firsts.values())[:size]]
    if partition != "biased":
        raise UsageError(f"partition={partition} is not known to the label study; choose iid, biased or different")
    present = labels.unique()
    if len(present) < 3:
        raise UsageError(f"partition=biased needs three classes and the data have {len(present)}; choose iid")
    first, second = present[torch.randperm(len(present), generator=generator)[:2]].tolist()
    half, quarter = -(-size // 2), size // 4
    parts = [
        _draw((labels == first).nonzero()[:, 0], half, generator),
        _draw((labels == second).nonzero()[:, 0], quarter, generator),
        _draw(((labels != first) & (labels != second)).nonzero()[:, 0], size - half - quarter, generator),
    ]
    return torch.cat(parts)


def client_update(
    model: nn.Module, images: Tensor, labels: Tensor, training: LocalTraining = ONE_STEP, *, run: int
) -> Observation:
    """What the server sees of a client that trains on consecutive batches, in the model's own mode."""
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    buffers = {name: value.detach().clone() for name, value in model.named_buffers()}
    size = len(labels) // (training.local_steps or 1)
    training = replace(training, batch_size=size, training_mode=model.training)
    result = local_update(model, start, buffers, images, labels, training)
    return Observation(run + 1, 0, start, result.update, training, start_buffers=buffers)


def label_study(
    images: Tensor,
    labels: Tensor,
    *,
    model: Callable[[int], nn.Module],
    methods: Mapping[str, LabelInference],
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32),
    partitions: Sequence[Partition] = ("iid", "biased"),
    stages: Sequence[int] = (0,),
    runs: int = 10,
    data: str = "data",
    auxiliary_share: float = 0.2,
    training: LocalTraining = ONE_STEP,
    train: Callable[[nn.Module, Tensor, Tensor, int, torch.Generator], None] | None = None,
    seed: int = 0,
    on_cell: Callable[[str, str, int, int, float], None] | None = None,
    earlier: Sequence[Mapping[str, Any]] = (),
    on_rows: Callable[[pd.DataFrame], None] | None = None,
) -> pd.DataFrame:
    """Attack a fresh network in every run with every method, and score the labels.

    Each run draws a network, and carries it through the stages by training it on the data; at each stage every
    batch size and partition draws one victim's batch. All methods see the same updates. Auxiliary images are set
    aside first: no network is trained on them and no victim holds them.

    Args:
        images: ``[M, C, H, W]`` in [0, 1].
        labels: ``[M]`` int64.
        model: seed -> a freshly initialised network.
        methods: name -> label inference. A method that only takes single samples is left out of larger batches.
        batch_sizes: samples per local step.
        partitions: how a victim's batch is drawn, see `draw_batch`.
        stages: training steps before the attack.
        runs: networks.
        data: name for the table.
        auxiliary_share: the part of the data that is set aside for methods that need auxiliary data.
        training: what clients do, with batches of each of the sizes.
        train: (model, images, labels, steps, generator) trains in place; by default Adam at 3e-3, batches of 64.
        seed: decides every random choice.
        on_cell: called with (method, partition, stage, batch size, mean label accuracy) after each.
        earlier: rows of an interrupted study of the same settings: what all runs are in is not computed again.
        on_rows: called with all rows so far after each.

    Returns:
        A row a method, partition, stage, batch size and run, in the columns of `COLUMNS`: `label_accuracy` is the
        overlap of true and inferred multiset over the number of labels, `labels_exact` whether all agree,
        `counts_exact` the share of classes whose count is right, `seconds` the method's time for this update (an
        equal share of the call for all runs). `attrs["accuracy"]` maps each stage to the networks' mean test accuracy
        on the auxiliary part.
    """
    train = train or adam
    classes = int(labels.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    aside = max(1, int(auxiliary_share * len(labels)))
    held, pool = order[:aside], order[aside:]
    auxiliary = images[held], labels[held]
    images, labels = images[pool], labels[pool]

    networks = [model(seed * 100_003 + run) for run in range(runs)]
    knowledge = Knowledge(
        networks[0], tuple(images.shape[1:]), classes, ThreatModel(auxiliary_data=True), auxiliary  # type: ignore[arg-type]
    )  # fmt: skip
    rows: list[tuple[object, ...]] = []
    accuracies: dict[int, float] = {}
    done = 0
    for stage in sorted(stages):
        for network in networks:
            train(network, images, labels, stage - done, generator)
        done = stage
        accuracies[stage] = sum(_accuracy(network, *auxiliary) for network in networks) / runs
        for batch_size in batch_sizes:
            for partition in partitions:
                truth, observations = _victims(
                    networks, (images, labels, classes), batch_size, partition, training, generator
                )
                for name, method in methods.items():
                    where = name, data, partition, stage, batch_size
                    before = _scored_before(earlier, where, runs)
                    scored = before or _score(method, observations, truth, knowledge, seed)
                    rows += [(name, data, partition, stage, batch_size, run, *row) for run, row in enumerate(scored)]
                    if on_cell and scored:
                        on_cell(name, partition, stage, batch_size, sum(row[0] for row in scored) / runs)
                    if on_rows is not None and scored and not before:
                        on_rows(pd.DataFrame(rows, columns=COLUMNS))
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame.attrs["accuracy"] = accuracies
    return frame


def _scored_before(
    earlier: Sequence[Mapping[str, Any]], where: tuple[object, ...], runs: int
) -> list[tuple[float, bool, float, float]] | None:
    """What `_score` found of a cell before a study was interrupted, None where that is not all there."""
    found = [row for row in earlier if tuple(row[column] for column in COLUMNS[:5]) == where]
    by_run = {row["run"]: row for row in found}
    if sorted(by_run) != list(range(runs)):
        return None
    return [tuple(by_run[run][column] for column in COLUMNS[6:]) for run in range(runs)]


def adam(network: nn.Module, images: Tensor, labels: Tensor, steps: int, generator: torch.Generator) -> None:
    """Train in place with Adam at 3e-3 on batches of 64."""
    if not steps:
        return
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(len(labels), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
        optimizer.step()


def _victims(
    networks: Sequence[nn.Module],
    data: tuple[Tensor, Tensor, int],
    batch_size: int,
    partition: Partition,
    training: LocalTraining,
    generator: torch.Generator,
) -> tuple[list[Tensor], list[Observation]]:
    """A victim of each network: the true class counts ``[classes]``, and what the server sees of it."""
    images, labels, classes = data
    truth, observations = [], []
    for run, network in enumerate(networks):
        batch = draw_batch(labels, batch_size * (training.local_steps or 1), partition, generator)
        batch = batch[torch.randperm(len(batch), generator=generator)]
        truth.append(torch.bincount(labels[batch], minlength=classes))
        observations.append(client_update(network, images[batch], labels[batch], training, run=run))
    return truth, observations


def _score(
    method: LabelInference,
    observations: Sequence[Observation],
    truth: Sequence[Tensor],
    knowledge: Knowledge,
    seed: int,
) -> list[tuple[float, bool, float, float]]:
    """(label accuracy, labels exact, counts exact, seconds) of each observation; nothing for iDLG on batches."""
    too_many = method.most_samples == 1 and any(int(counts.sum()) > 1 for counts in truth)
    if too_many or "per_sample_gradients" in method.needs:
        return []
    if "labels" in method.needs:
        observations = [
            replace(observation, labels=torch.arange(len(counts)).repeat_interleave(counts))
            for observation, counts in zip(observations, truth, strict=True)
        ]
    began = time.perf_counter()
    guesses = method.infer(observations, knowledge, Run(seed=seed))
    seconds = (time.perf_counter() - began) / len(observations)
    scored = []
    for guess, counts in zip(guesses, truth, strict=True):
        if guess is None:
            return []
        found = torch.bincount(guess.best, minlength=len(counts))
        overlap = float(torch.minimum(found, counts).sum()) / float(counts.sum())
        scored.append((overlap, bool(torch.equal(found, counts)), float((found == counts).double().mean()), seconds))
    return scored


def _accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((network(images[:1000]).argmax(dim=1) == labels[:1000]).double().mean())


def _draw(pool: Tensor, size: int, generator: torch.Generator) -> Tensor:
    if len(pool) == 0:
        raise UsageError("the label study found no image of a class it has to draw; choose partition=iid")
    if len(pool) >= size:
        return pool[torch.randperm(len(pool), generator=generator)[:size]]
    return pool[torch.randint(len(pool), (size,), generator=generator)]
