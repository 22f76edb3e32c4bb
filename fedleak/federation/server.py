"""The server: a Flower ServerApp whose strategy is wrapped in the eavesdropper."""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from torch.func import functional_call

from fedleak import files
from fedleak.capture import CaptureStore, Observation
from fedleak.data import to_float
from fedleak.errors import UsageError
from fedleak.federation.checkpoint import Checkpoint
from fedleak.federation.eavesdropper import Eavesdropper
from fedleak.federation.memory import Memory, Unstorable, recall, remember
from fedleak.federation.records import to_arrays, to_tensors
from fedleak.federation.scenario import Scenario, build_strategy
from fedleak.federation.strategy import Repeatable
from fedleak.rounds import NOTHING
from fedleak.shards import Background

log = logging.getLogger("fedleak")

ROUND_COLUMNS = ("round", "clients", "train_loss", "test_accuracy", "seconds")


@dataclass(frozen=True)
class RoundRow:
    """One line of `rounds.csv`; `test_accuracy` is None after a round that is not evaluated."""

    round: int
    clients: int
    train_loss: float
    test_accuracy: float | None
    seconds: float


def read_rows(path: Path) -> list[RoundRow]:
    """The lines of a `rounds.csv`; raises `UsageError` where it holds something else."""
    try:
        with path.open(newline="") as file:
            return [
                RoundRow(
                    int(row["round"]),
                    int(row["clients"]),
                    float(row["train_loss"]),
                    float(row["test_accuracy"]) if row["test_accuracy"] else None,
                    float(row["seconds"]),
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: damaged ({error}); restore it, or repeat the run") from error


def make_server_app(
    scenario: Scenario,
    run_dir: Path,
    *,
    on_row: Callable[[RoundRow], None] | None = None,
    on_round: Callable[[int, list[Observation]], None] | None = None,
    since: Checkpoint | None = None,
    of: str = "",
    writer: Background | None = None,
) -> ServerApp:
    """The ServerApp of a federation: writes `captures/` and `rounds.csv`, a line as each round ends, and a checkpoint.

    Args:
        scenario: the federation.
        run_dir: where to write.
        on_row: called with each round's line.
        on_round: called with each round's observations, see `Eavesdropper`.
        since: what to go on from, `rewind` done; None begins with the first round.
        of: what the run is of, for its checkpoints.
        writer: writes the captures, and has the truth to write as well where clients are in this process.
    """
    app = ServerApp()
    parameters, buffers = scenario.start()
    keeper = _Checkpoints(run_dir, build_strategy(scenario), since, of)

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = _overheard(scenario, run_dir, keeper, on_round)
        if isinstance(strategy, Eavesdropper) and writer is not None:
            strategy.store.writer = writer
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / "rounds.csv").open("w" if since is None else "a", newline="") as file:
            rounds = _Rounds(scenario, keeper, strategy, file, on_row)

            def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
                accuracy = rounds.end(server_round, arrays) if server_round else None
                return None if accuracy is None else MetricRecord({"test_accuracy": accuracy})

            model = {**parameters, **buffers} if since is None else since.model
            left = scenario.federation.rounds - keeper.inner.done
            strategy.start(grid, to_arrays(model), num_rounds=left, evaluate_fn=evaluate)

    return app


def _overheard(
    scenario: Scenario,
    run_dir: Path,
    keeper: _Checkpoints,
    on_round: Callable[[int, list[Observation]], None] | None,
) -> Strategy:
    """The strategy in its eavesdropper, or without one where nothing is to be kept."""
    if scenario.keep == NOTHING:
        return keeper.inner
    dtype = None if scenario.keep.dtype is None else getattr(torch, scenario.keep.dtype)
    return Eavesdropper(
        keeper.inner,
        run_dir / "captures",
        model=scenario.model,
        threat=scenario.threat,
        payload=scenario.federation.payload,
        image_shape=scenario.image_shape,
        classes=scenario.data.classes,
        optimizer=scenario.training.optimizer,
        epochs=scenario.training.epochs or 1,
        training_mode=scenario.federation.training_mode,
        per_sample=scenario.threat.per_sample_gradients,
        client_of=keeper.inner.partition_of.get,
        every=scenario.federation.capture_every,
        keep=scenario.keep,
        on_round=on_round,
        quiet=True,
        store=None if keeper.since is None else CaptureStore.go_on(run_dir / "captures", dtype=dtype),
    )


class _Checkpoints:
    """What a federation writes after each round to go on from, and what it went on from itself."""

    def __init__(self, run_dir: Path, inner: Repeatable, since: Checkpoint | None, of: str) -> None:
        self.run_dir, self.inner, self.since, self.of = run_dir, inner, since, of
        self.began = time.perf_counter()
        if since is not None:
            recall(inner.strategy, since.memory)
            inner.done = since.round

    def write(self, server_round: int, arrays: ArrayRecord, strategy: Strategy) -> None:
        """A checkpoint, once what the eavesdropper heard in this round is on disk."""
        model, memory = to_tensors(arrays), _memory(self.inner.strategy, aloud=server_round == self.inner.done + 1)
        seconds = time.perf_counter() - self.began + (0.0 if self.since is None else self.since.seconds)
        rounds = files.digest(self.run_dir / "rounds.csv")  # now, before another round's line is there

        def write(lines: int) -> None:
            Checkpoint(server_round, model, memory, lines, self.of, seconds, rounds).write(self.run_dir)

        if isinstance(strategy, Eavesdropper):
            strategy.store.afterwards(write, sum(v.nbytes for v in [*model.values(), *memory.tensors.values()]))
        else:
            write(0)


class _Rounds:
    """The lines of `rounds.csv`, with a checkpoint behind each."""

    def __init__(
        self,
        scenario: Scenario,
        keeper: _Checkpoints,
        strategy: Strategy,
        file: TextIO,
        on_row: Callable[[RoundRow], None] | None,
    ) -> None:
        self.scenario, self.keeper, self.strategy, self.file, self.on_row = scenario, keeper, strategy, file, on_row
        self.writer = csv.writer(file)
        if keeper.since is None:
            self.writer.writerow(ROUND_COLUMNS)
        self.last = time.perf_counter()

    def end(self, server_round: int, arrays: ArrayRecord) -> float | None:
        """Write a round's line and checkpoint; the test accuracy where the round is evaluated."""
        inner = self.keeper.inner
        server_round += inner.done
        evaluated = self.scenario.federation.evaluates(server_round)
        accuracy = test_accuracy(self.scenario, arrays) if evaluated else None
        now = time.perf_counter()
        row = RoundRow(server_round, inner.aggregated, inner.train_loss, accuracy, round(now - self.last, 4))
        self.last = now
        self.writer.writerow([getattr(row, column) for column in ROUND_COLUMNS])
        self.file.flush()  # before its checkpoint, which counts on it
        if self.on_row is not None:
            self.on_row(row)
        self.keeper.write(server_round, arrays, self.strategy)
        return accuracy


def _memory(strategy: Strategy, *, aloud: bool) -> Memory:
    """What a strategy remembers, or that it cannot be written down."""
    try:
        return remember(strategy)
    except Unstorable as problem:
        if aloud:
            log.warning("%s, which cannot be stored: if this run is interrupted, it cannot be gone on with", problem)
        return Memory(["unstorable", str(problem)], {})


@torch.no_grad()
def test_accuracy(scenario: Scenario, arrays: ArrayRecord) -> float:
    """Accuracy of the shared model on the test images, in eval mode."""
    state = {name: value.to(scenario.device) for name, value in to_tensors(arrays).items()}
    model = scenario.model.to(scenario.device).eval()
    correct = 0
    for chosen in scenario.utility.split(1000):
        logits = functional_call(model, state, (to_float(scenario.data.test_images[chosen]).to(scenario.device),))
        correct += int((logits.argmax(1).cpu() == scenario.data.test_labels[chosen]).sum())
    return correct / max(1, len(scenario.utility))
