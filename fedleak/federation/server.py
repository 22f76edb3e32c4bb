"""The server: a Flower ServerApp whose strategy is wrapped in the eavesdropper."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from torch.func import functional_call

from fedleak.capture import Observation
from fedleak.data import to_float
from fedleak.federation.eavesdropper import Eavesdropper
from fedleak.federation.records import to_arrays, to_tensors
from fedleak.federation.scenario import Scenario, build_strategy
from fedleak.rounds import NOTHING

ROUND_COLUMNS = ("round", "clients", "train_loss", "test_accuracy", "seconds")


@dataclass(frozen=True)
class RoundRow:
    """One line of `rounds.csv`; `test_accuracy` is None after a round that is not evaluated."""

    round: int
    clients: int
    train_loss: float
    test_accuracy: float | None
    seconds: float


def make_server_app(
    scenario: Scenario,
    run_dir: Path,
    *,
    on_row: Callable[[RoundRow], None] | None = None,
    on_round: Callable[[int, list[Observation]], None] | None = None,
) -> ServerApp:
    """The ServerApp of a federation: writes `captures/` and `rounds.csv`, a line as each round ends.

    Args:
        scenario: the federation.
        run_dir: where to write.
        on_row: called with each round's line.
        on_round: called with each round's observations, see `Eavesdropper`.
    """
    app = ServerApp()
    federation = scenario.federation
    parameters, buffers = scenario.start()
    inner = build_strategy(scenario)

    def overheard() -> Strategy:
        if scenario.keep == NOTHING:
            return inner
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
        )

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = overheard()
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / "rounds.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(ROUND_COLUMNS)
            last = time.perf_counter()

            def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
                nonlocal last
                if server_round == 0:
                    return None
                accuracy = test_accuracy(scenario, arrays) if federation.evaluates(server_round) else None
                now = time.perf_counter()
                row = RoundRow(server_round, inner.aggregated, inner.train_loss, accuracy, round(now - last, 4))
                last = now
                writer.writerow([getattr(row, column) for column in ROUND_COLUMNS])
                file.flush()
                if on_row is not None:
                    on_row(row)
                return None if accuracy is None else MetricRecord({"test_accuracy": accuracy})

            strategy.start(
                grid, to_arrays({**parameters, **buffers}), num_rounds=federation.rounds, evaluate_fn=evaluate
            )

    return app


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
