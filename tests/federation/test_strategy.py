"""Clients that fail, and the exact weighted mean."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict

from fedleak.cli import main
from fedleak.defenses import Defense
from fedleak.federation.engine import LocalGrid
from fedleak.federation.records import to_arrays, to_tensors
from fedleak.federation.strategy import FedSGD, RepeatableFedAvg

RUN = ["run", "federation.rounds=2", "federation.clients=3", "federation.batch_size=1", "attack=labels_only"]


def calls(fault):
    """A defense that fails every other time."""

    class Faulty(Defense):
        def apply(self, update, *, generator):
            if int(torch.randint(0, 2, (), generator=generator)) == 0:
                return dict(update)
            return fault(update)

    return Faulty


def raises(update):
    raise RuntimeError("my disk is full")


class Raises(calls(raises)):
    pass


class NotFinite(calls(lambda u: {n: v * float("nan") for n, v in u.items()})):
    pass


class WrongShape(calls(lambda u: {n: v.flatten()[:1] for n, v in u.items()})):
    pass


class Missing(calls(lambda u: dict(list(u.items())[1:]) | {"extra": torch.zeros(1)})):
    pass


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Raises", "client error: RuntimeError: my disk is full"),
        ("NotFinite", "bad update: not finite"),
        ("WrongShape", "bad update: wrong shape"),
        ("Missing", "client error: UsageError: defense=Missing "),
    ],
)
def test_a_failing_client_stops_neither_the_federation_nor_the_attacker(tmp_path, name, reason, monkeypatch):
    module = tmp_path / "faulty_defenses.py"
    module.write_text(Path(__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "run"
    assert main([*RUN, f"defense._target_=faulty_defenses.{name}", "seed=1", f"output_dir={folder}"]) == 0
    rounds, attacks = pd.read_csv(folder / "rounds.csv"), pd.read_csv(folder / "attacks.csv")
    failed = attacks[attacks.stop_reason != "labels_only"]
    assert 0 < len(failed) < len(attacks) == 6
    assert all(text.startswith(reason) for text in failed.stop_reason)
    assert failed.label_accuracy.isna().all()
    assert rounds.clients.sum() == 6 - len(failed)
    assert attacks[attacks.stop_reason == "labels_only"].label_accuracy.notna().all()


def reply(node: int, update: dict, examples: int) -> Message:
    LocalGrid(lambda *_: None, 1)  # type: ignore[arg-type]  # gives this process a sender identity
    content = {
        "arrays": to_arrays(update),
        "metrics": MetricRecord({"num-examples": examples, "train_loss": float(node)}),
    }
    message = Message(RecordDict(content), dst_node_id=0, message_type=MessageType.TRAIN)
    message.metadata.__dict__["_src_node_id"] = node
    return message


@pytest.mark.parametrize("kind", ["fedavg", "fedsgd"])
def test_the_aggregate_is_the_exact_weighted_mean_in_any_order_of_arrival(kind):
    common = {"clients": 3, "fraction": 1.0, "seed": 0}
    strategy = FedSGD(lr=0.5, **common) if kind == "fedsgd" else RepeatableFedAvg(**common)
    strategy.partition_of = {11: 0, 22: 1, 33: 2}
    start = {"w": torch.tensor([1.0, 2.0])}
    updates = {11: torch.tensor([0.1, 0.7]), 22: torch.tensor([0.3, -0.2]), 33: torch.tensor([5.0, 1.0])}
    examples = {11: 1, 22: 2, 33: 5}
    strategy._sent = to_arrays(start)
    results = []
    for order in ([11, 22, 33], [33, 11, 22]):
        arrays, _ = strategy.aggregate_train(1, [reply(n, {"w": updates[n]}, examples[n]) for n in order])
        results.append(to_tensors(arrays)["w"])
    mean = sum(examples[n] / 8 * updates[n] for n in updates)
    torch.testing.assert_close(results[0], mean if kind == "fedavg" else start["w"] - 0.5 * mean)
    assert torch.equal(results[0], results[1])
    assert strategy.train_loss == pytest.approx((11 + 2 * 22 + 5 * 33) / 8)


def test_arrays_survive_the_wire():
    tensors = {"b": torch.rand(3), "a": torch.rand(2, 2)}
    arrays = to_arrays(tensors)
    assert isinstance(arrays, ArrayRecord)
    back = to_tensors(arrays)
    assert list(back) == ["b", "a"]
    assert all(torch.equal(back[n], tensors[n]) for n in tensors)
