"""Clients that fail, and the exact weighted mean."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg

from fedleak.cli import main
from fedleak.config import choice_files
from fedleak.defenses import Defense
from fedleak.errors import UsageError
from fedleak.federation.engine import LocalGrid
from fedleak.federation.records import to_arrays, to_tensors
from fedleak.federation.scenario import build_scenario, build_strategy
from fedleak.federation.strategy import Repeatable, dropped, sampled
from fedleak.setup import compose

RUN = ["run", "federation.rounds=2", "federation.clients=3", "federation.batch_size=1", "attack=labels_only"]
RUN = [*RUN, "limit=off"]


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
    step = (lambda _: 0.5) if kind == "fedsgd" else None
    strategy = Repeatable(FedAvg(), clients=3, fraction=1.0, seed=0, step=step)
    strategy.partition_of = {11: 0, 22: 1, 33: 2}
    start = {"w": torch.tensor([1.0, 2.0])}
    updates = {11: torch.tensor([0.1, 0.7]), 22: torch.tensor([0.3, -0.2]), 33: torch.tensor([5.0, 1.0])}
    examples = {11: 1, 22: 2, 33: 5}
    strategy._sent = start
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


STRATEGIES = sorted(choice_files()["strategy"])


def test_the_strategies_of_the_contract_are_there():
    assert set(STRATEGIES) >= {
        "fedavg",
        "fedprox",
        "fedavgm",
        "fedadam",
        "fedyogi",
        "krum",
        "trimmed_mean",
        "dp_server",
    }


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_runs_and_is_repeatable(tmp_path, name):
    tables = []
    for run in ("a", "b"):
        folder = tmp_path / run
        command = ["run", f"strategy={name}", "federation=fedavg", "federation.rounds=2", "federation.local_steps=2"]
        assert (
            main([*command, "federation.batch_size=1", "attack=labels_only", "limit=off", f"output_dir={folder}"]) == 0
        )
        tables.append(pd.read_csv(folder / "rounds.csv").drop(columns="seconds"))
        residual = pd.read_csv(folder / "attacks.csv").update_residual
        assert (residual < 1e-5).all() or name == "dp_client"  # what clients clip is a defense
    assert tables[0].equals(tables[1])


def test_a_strategy_that_needs_models_gets_them_where_clients_send_gradients():
    gradients, start = {11: torch.tensor([0.1, 0.7]), 22: torch.tensor([0.3, -0.2])}, torch.tensor([1.0, 2.0])
    strategy = Repeatable(FedAdam(eta=0.1), clients=2, fraction=1.0, seed=0, step=lambda r: 0.5 / r)
    strategy.partition_of = {11: 0, 22: 1}
    messages = [reply(node, {"w": g}, 1) for node, g in gradients.items()]
    grid = LocalGrid(lambda *_: None, 2)
    grid.get_node_ids = lambda: [22, 11]
    sent = list(strategy.configure_train(2, to_arrays({"w": start}), ConfigRecord(), grid))
    assert [m.metadata.dst_node_id for m in sent] == [11, 22]
    found = to_tensors(strategy.aggregate_train(2, messages)[0])["w"]

    plain = FedAdam(eta=0.1)
    list(plain.configure_train(2, to_arrays({"w": start}), ConfigRecord(), grid))
    wanted = plain.aggregate_train(2, [reply(node, {"w": start - 0.25 * g}, 1) for node, g in gradients.items()])[0]
    torch.testing.assert_close(found, to_tensors(wanted)["w"].float())


def test_buffers_are_averaged_whatever_the_strategy_does():
    strategy = Repeatable(FedAdam(eta=0.1), clients=2, fraction=1.0, seed=0, buffers=["running_var"])
    strategy.partition_of = {11: 0, 22: 1}
    grid = LocalGrid(lambda *_: None, 2)
    grid.get_node_ids = lambda: [11, 22]
    start = {"w": torch.tensor([1.0]), "running_var": torch.tensor([1.0])}
    sent = list(strategy.configure_train(1, to_arrays(start), ConfigRecord(), grid))
    assert set(to_tensors(sent[0].content["arrays"])) == set(start)
    replies = [
        reply(n, {"w": torch.zeros(1), "running_var": torch.tensor([v])}, c) for n, v, c in ((11, 1.0, 3), (22, 5.0, 1))
    ]
    assert float(to_tensors(strategy.aggregate_train(1, replies)[0])["running_var"]) == pytest.approx(2.0)


def test_who_takes_part_and_who_drops_out_is_decided_by_the_seed():
    assert sampled(0, 10, 0.3, 1) == sampled(0, 10, 0.3, 1) != sampled(0, 10, 0.3, 2)
    assert len(sampled(0, 10, 0.01, 1)) == 1
    for dropout, count in ((0.0, 0), (0.5, 2), (0.99, 3)):
        gone = dropped(0, [1, 4, 5, 9], dropout, 1)
        assert len(gone) == count
        assert gone <= {1, 4, 5, 9}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy=dp_client", "federation=fedsgd"], "choose federation.payload=weights"),
        (["strategy=dp_server", "federation.fraction=0.5"], r"num_sampled_clients=4: .* make it 2"),
        (["strategy=fedavg", "+strategy.fraction_train=0.5"], "give federation.fraction instead"),
        (["strategy._target_=fedleak.training.SGD", "+strategy.lr=1"], "gives no Strategy"),
    ],
)
def test_a_strategy_that_does_not_fit_is_refused(overrides, message):
    with pytest.raises(UsageError, match=message):
        build_strategy(build_scenario(compose(overrides)))
