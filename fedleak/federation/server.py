"""The server: a Flower ServerApp whose strategy is wrapped in the eavesdropper."""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from torch.func import functional_call

from fedleak.capture import CaptureStore, Observation
from fedleak.data import to_float
from fedleak.errors import UsageError
from fedleak.federation.checkpoint import Checkpoint
from fedleak.federation.eavesdropper import Eavesdropper
from fedleak.federation.memory import Memory, Unstorable, recall, remember
from fedleak.federation.records import to_arrays, to_tensors
from fedleak.federation.scenario import Scenario, build_strategy
from fedleak.rounds import NOTHING

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
) -> ServerApp:
    """The ServerApp of a federation: writes `captures/` and `rounds.csv`, a line as each round ends, and a checkpoint.

    Args:
        scenario: the federation.
        run_dir: where to write.
        on_row: called with each round's line.
        on_round: called with each round's observations, see `Eavesdropper`.
        since: what to go on from, `rewind` done; None begins with the first round.
        of: what the run is of, for its checkpoints.
    """
    app = ServerApp()
    federation = scenario.federation
    parameters, buffers = scenario.start()
    inner = build_strategy(scenario)
    began = time.perf_counter()
    if since is not None:
        recall(inner.strategy, since.memory)
        inner.done = since.round

    def overheard() -> Strategy:
        if scenario.keep == NOTHING:
            return inner
        dtype = None if scenario.keep.dtype is None else getattr(torch, scenario.keep.dtype)
        return Eavesdropper(
            inner,
            run_dir / "captures",
            model=scenario.model,
            threat=scenario.threat,
            payload=federation.payload,
            image_shape=scenario.image_shape,
            classes=scenario.data.classes,
            optimizer=scenario.training.optimizer,
            epochs=scenario.training.epochs or 1,
            training_mode=federation.training_mode,
            per_sample=scenario.threat.per_sample_gradients,
            client_of=inner.partition_of.get,
            every=federation.capture_every,
            keep=scenario.keep,
            on_round=on_round,
            quiet=True,
            store=None if since is None else CaptureStore.go_on(run_dir / "captures", dtype=dtype),
        )

    def checkpoint(server_round: int, arrays: ArrayRecord, strategy: Strategy) -> None:
        model, memory = to_tensors(arrays), _memory(inner.strategy, aloud=server_round == inner.done + 1)
        seconds = time.perf_counter() - began + (0.0 if since is None else since.seconds)

        def write(lines: int) -> None:
            Checkpoint(server_round, model, memory, lines, of, seconds).write(run_dir)

        if isinstance(strategy, Eavesdropper):
            strategy.store.afterwards(write, sum(v.nbytes for v in [*model.values(), *memory.tensors.values()]))
        else:
            write(0)

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = overheard()
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / "rounds.csv").open("w" if since is None else "a", newline="") as file:
            writer = csv.writer(file)
            if since is None:
                writer.writerow(ROUND_COLUMNS)
            last = time.perf_counter()

            def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
                nonlocal last
                if server_round == 0:
                    return None
                server_round += inner.done
                accuracy = test_accuracy(scenario, arrays) if federation.evaluates(server_round) else None
                now = time.perf_counter()
                row = RoundRow(server_round, inner.aggregated, inner.train_loss, accuracy, round(now - last, 4))
                last = now
                writer.writerow([getattr(row, column) for column in ROUND_COLUMNS])
                file.flush()
                if on_row is not None:
                    on_row(row)
                checkpoint(server_round, arrays, strategy)
                return None if accuracy is None else MetricRecord({"test_accuracy": accuracy})

            model = {**parameters, **buffers} if since is None else since.model
            strategy.start(grid, to_arrays(model), num_rounds=federation.rounds - inner.done, evaluate_fn=evaluate)

    return app


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
