"""Faults that an audit from Python used to have: each has the right value now."""

import logging
from dataclasses import replace

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg
from torch import nn
from torch.nn.functional import cross_entropy

import fedleak
from fedleak.errors import UsageError
from fedleak.federation.engine import LocalEngine

LABELS = torch.tensor([[1, 3, 3, 7], [0, 2, 5, 9]])


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """fedleak's log, which a run under Hydra earlier in this process may have silenced."""
    log = logging.getLogger("fedleak")
    monkeypatch.setattr(log, "disabled", False)
    monkeypatch.setattr(log, "propagate", True)
    before = log.level
    log.setLevel(logging.WARNING)
    yield
    log.setLevel(before)


def small_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Sigmoid(), nn.Linear(24, 10))


def clients(optimizer="SGD", lr=0.1, examples=4, change=lambda state, start: state) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        me = int(context.node_config["partition-id"])
        model = small_model()
        state = message.content["arrays"].to_torch_state_dict()
        model.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(me))
        optimiser = getattr(torch.optim, optimizer)(model.parameters(), lr=lr)
        cross_entropy(model((images - 0.5) / 0.5), LABELS[me]).backward()
        optimiser.step()
        sent = change(model.state_dict(), start)
        metrics = MetricRecord({"num-examples": examples})
        return Message(RecordDict({"arrays": ArrayRecord(sent), "m": metrics}), reply_to=message)

    return app


def captured(folder, app, *, inner=None, rounds=1, config=None, **known):
    server = ServerApp()

    @server.main()
    def main(grid, context):
        strategy = fedleak.Eavesdropper(
            inner or FedAvg(fraction_evaluate=0.0), folder, model=small_model(), quiet=True, **known
        )
        arrays = ArrayRecord(small_model().state_dict())
        strategy.start(grid, arrays, num_rounds=rounds, train_config=ConfigRecord(config or {}))

    LocalEngine().run(server, app, 2)
    return fedleak.CaptureStore.open(folder).load()


def read_labels(folder, **more):
    return fedleak.attack(
        folder, small_model(), "labels_only", image_shape=(1, 8, 8), classes=10, normalize=(0.5, 0.5), **more
    )


def test_examples_go_before_a_stated_batch_that_they_contradict(tmp_path, caplog):
    seen = captured(tmp_path / "a", clients(examples=800), lr=0.1, batch_size=1)
    assert [(o.training.batch_size, o.training.local_steps) for o in seen] == [(1, 800)] * 2
    with pytest.raises(UsageError, match="holds 800"):
        fedleak.attack(tmp_path / "a", small_model(), "idlg", image_shape=(1, 8, 8), classes=10)
    captured(tmp_path / "b", clients(examples=800), lr=0.1, batch_size=1, local_steps=1)
    assert "800 examples are no 1 steps of 1 in 1 epochs: what was stated cannot be true" in caplog.text


def test_a_learning_rate_of_the_messages_is_told_where_another_was_stated(tmp_path, caplog):
    captured(tmp_path, clients(), lr=0.5, batch_size=4, config={"lr": 0.1})
    assert "lr=0.5 was stated, and the messages say 0.1" in caplog.text


def test_adam_is_noticed_where_sgd_was_stated(tmp_path, caplog):
    captured(tmp_path, clients("Adam", lr=0.001), lr=0.001, batch_size=4, local_steps=1)
    found = read_labels(tmp_path)
    assert all("Adam's" in r.details["contradiction"] for r in found)
    assert "2 of 2 updates" in caplog.text


def test_right_words_are_left_alone_and_the_labels_are_right(tmp_path, caplog):
    captured(tmp_path, clients(), lr=0.1, batch_size=4, local_steps=1)
    found = read_labels(tmp_path)
    assert [r.labels.tolist() for r in found] == LABELS.tolist()
    assert [r.details.get("contradiction") for r in found] == [None, None]
    assert caplog.text == ""


def test_mixed_kinds_of_numbers_abort_nothing(tmp_path):
    """FedAdam sends float64 from the second round on; some clients answer in float16."""
    inner = FedAdam(eta=1e-4, fraction_evaluate=0.0)
    seen = captured(tmp_path, clients(), inner=inner, rounds=2, lr=0.1, batch_size=4, local_steps=1)
    assert {str(o.parameters["1.weight"].dtype) for o in seen} == {"torch.float32", "torch.float64"}
    found = read_labels(tmp_path)
    assert [r.labels.tolist() for r in found] == LABELS.tolist() * 2


def test_frozen_extra_and_reordered_tensors_are_no_reason_to_throw_an_update_away(tmp_path):
    def change(state, start):
        kept = {name: value for name, value in reversed(state.items()) if not name.startswith("1.")}
        return {**kept, "ema": torch.ones(3)}

    class Tolerant(FedAvg):
        def aggregate_train(self, server_round, replies):
            return None, None

    inner = Tolerant(fraction_evaluate=0.0)
    seen = captured(tmp_path, clients(change=change), inner=inner, lr=0.1, batch_size=4, local_steps=1)
    assert [o.error for o in seen] == [None, None]
    assert list(seen[0].update) == list(small_model().state_dict())
    assert torch.equal(seen[0].update["1.weight"], seen[0].parameters["1.weight"])
    assert [r.labels.tolist() for r in read_labels(tmp_path)] == LABELS.tolist()


def test_an_empty_update_is_empty_and_stops_no_other(tmp_path):
    def change(state, start):
        return start if torch.rand(1, generator=GENERATOR) < 0.5 else state

    seen = captured(tmp_path, clients(change=change), rounds=4, lr=0.1, batch_size=4, local_steps=1)
    empty = [torch.equal(o.update["3.bias"], o.parameters["3.bias"]) for o in seen]
    assert 0 < sum(empty) < 8
    found = read_labels(tmp_path)
    for gone, r, truth in zip(empty, found, LABELS.tolist() * 4, strict=True):
        assert r.labels.tolist() == ([] if gone else truth)
        assert r.stop_reason.startswith("empty") == gone


GENERATOR = torch.Generator().manual_seed(3)


def test_normalisation_that_is_named_gives_the_image(tmp_path):
    app = ClientApp()
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = small_model()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        cross_entropy(model((image - 0.5) / 0.5), torch.tensor([4])).backward()
        sent = {name: p.grad for name, p in model.named_parameters()}
        content = {"arrays": ArrayRecord(sent), "m": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    class Ignores(FedAvg):
        def aggregate_train(self, server_round, replies):
            return None, None

    inner = Ignores(fraction_evaluate=0.0)
    captured(tmp_path, app, inner=inner, payload="gradient", batch_size=1, local_steps=1)
    options = {"image_shape": (1, 8, 8), "classes": 10}
    found = fedleak.attack(tmp_path, small_model(), normalize=(0.5, 0.5), **options)[0]
    assert found.labels.tolist() == [4]
    assert float((found.images[0] - image[0]).square().mean()) < 1e-4
    wrong = fedleak.attack(tmp_path, small_model(), **options)[0]
    assert float((wrong.images[0] - image[0]).square().mean()) > 1e-3


def test_an_update_of_another_float_is_taken_to_float32_and_errors_are_left_alone():
    one = fedleak.Observation(1, 0, {"w": torch.ones(2).double()}, {"w": torch.zeros(2).half()})
    from fedleak.audit.screen import usable

    assert {v.dtype for v in (usable(one).parameters["w"], usable(one).update["w"])} == {torch.float32}
    broken = replace(one, error="client error: boom")
    assert usable(broken) is broken


def test_an_attack_on_single_samples_says_what_to_do_in_python_too(tmp_path):
    captured(tmp_path / "c", clients(), lr=0.1, local_steps=1)
    with pytest.raises(UsageError, match=r"holds 4; choose attack/labels=fedleak \(from Python method='fedleak'\)"):
        fedleak.attack(tmp_path / "c", small_model(), "idlg", image_shape=(1, 8, 8), classes=10)
    found = fedleak.attack(tmp_path / "c", small_model(), "labels_only", image_shape=(1, 8, 8), classes=10)
    assert [one.labels.tolist() for one in found] == LABELS.tolist()
