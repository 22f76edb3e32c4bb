"""The eavesdropper on a Flower app that is not ours: plain FedAvg, plain records, plain PyTorch."""

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.nn.functional import cross_entropy

import fedleak
from fedleak.federation.engine import LocalEngine
from fedleak.training import Adam

LR = 0.1
IMAGES = torch.rand(2, 1, 10, 10, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([2, 0])


def their_model() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(6 * 64, 3))
    for p in model.parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    return model


def their_client_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        me = int(context.node_config["partition-id"])
        model = their_model()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        cross_entropy(model(IMAGES[me : me + 1]), LABELS[me : me + 1]).backward()
        optimizer.step()
        return Message(
            RecordDict({"arrays": ArrayRecord(model.state_dict()), "m": MetricRecord({"num-examples": 1})}),
            reply_to=message,
        )

    return app


def their_server_app(wrap, rounds=2) -> tuple[ServerApp, list]:
    app, final = ServerApp(), []

    @app.main()
    def main(grid, context):
        strategy = wrap(FedAvg(fraction_evaluate=0.0))
        result = strategy.start(grid, ArrayRecord(their_model().state_dict()), num_rounds=rounds)
        final.append(result.arrays.to_torch_state_dict())

    return app, final


def test_one_line_audits_an_app_that_is_not_ours(tmp_path):
    def wrap(strategy):
        return fedleak.Eavesdropper(strategy, tmp_path / "captures", model=their_model(), lr=LR, batch_size=1)

    app, final = their_server_app(wrap)
    LocalEngine().run(app, their_client_app(), 2)
    plain_app, plain_final = their_server_app(lambda strategy: strategy)
    LocalEngine().run(plain_app, their_client_app(), 2)
    for name, value in plain_final[0].items():
        torch.testing.assert_close(final[0][name], value, msg="the federation must run as it did before")

    observations = fedleak.CaptureStore.open(tmp_path / "captures").load()
    assert [(o.round, o.client) for o in observations] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    first = observations[0]
    known = first.training
    assert (known.payload, known.lr, known.batch_size, first.error) == ("weights", LR, 1, None)
    model = their_model()
    cross_entropy(model(IMAGES[:1]), LABELS[:1]).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(first.gradient()[name], p.grad, rtol=1e-3, atol=1e-5)

    found = fedleak.attack(tmp_path / "captures", their_model(), "idlg", image_shape=(1, 10, 10), classes=3)
    assert [int(r.labels) for r in found] == [2, 0, 2, 0]
    errors = [float((r.images[0] - IMAGES[r.client]).square().mean()) for r in found[:2]]
    assert max(errors) < 1e-3


def test_withheld_metadata_stays_withheld(tmp_path):
    threat = fedleak.ThreatModel(batch_size=False, hyperparameters=False)

    def wrap(strategy):
        return fedleak.Eavesdropper(strategy, tmp_path, model=their_model(), threat=threat, lr=LR, batch_size=1)

    app, _ = their_server_app(wrap, rounds=1)
    LocalEngine().run(app, their_client_app(), 2)
    for o in fedleak.CaptureStore.open(tmp_path).load():
        assert (o.training.batch_size, o.training.optimizer, o.training.local_steps) == (None, None, None)


def test_an_attack_inline_gets_each_round_as_it_ends(tmp_path):
    rounds = []

    def wrap(strategy):
        return fedleak.Eavesdropper(
            strategy, tmp_path, model=their_model(), on_round=lambda number, seen: rounds.append((number, len(seen)))
        )

    app, _ = their_server_app(wrap)
    LocalEngine().run(app, their_client_app(), 2)
    assert rounds == [(1, 2), (2, 2)]


@pytest.mark.parametrize("keys", ["numbered", "named"])
def test_arrays_get_the_models_names_even_if_the_app_numbers_them(tmp_path, keys):
    model = their_model()
    arrays = model.state_dict()
    if keys == "numbered":
        arrays = {str(i): value for i, value in enumerate(arrays.values())}
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content = {"arrays": message.content["arrays"], "m": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    server = ServerApp()

    @server.main()
    def main(grid, context):
        strategy = fedleak.Eavesdropper(FedAvg(fraction_evaluate=0.0), tmp_path, model=model)
        strategy.start(grid, ArrayRecord(arrays), num_rounds=1)

    LocalEngine().run(server, app, 2)
    for o in fedleak.CaptureStore.open(tmp_path).load():
        assert list(o.parameters) == list(model.state_dict())
        assert list(o.update) == list(model.state_dict())


class Rotates(FedAvg):
    """Sends every second client another model, in a message of its own with its own learning rate."""

    def configure_train(self, server_round, arrays, config, grid):
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message in messages:
            if message.metadata.dst_node_id % 2 == 0:
                state = {name: value + 1 for name, value in arrays.to_torch_state_dict().items()}
                content = {"arrays": ArrayRecord(state), "config": ConfigRecord({"lr": 0.25, "local-steps": 1})}
                message.content = RecordDict(content)
        return messages


def test_what_each_message_carries_is_captured_not_what_the_strategy_was_handed(tmp_path):
    app = ServerApp()

    @app.main()
    def main(grid, context):
        inner = Rotates(fraction_evaluate=0.0)
        strategy = fedleak.Eavesdropper(inner, tmp_path, model=their_model(), optimizer=Adam(0.5), epochs=3)
        strategy.start(grid, ArrayRecord(their_model().state_dict()), num_rounds=1)

    LocalEngine().run(app, their_client_app(), 4)
    seen = fedleak.CaptureStore.open(tmp_path).load()
    start = their_model().state_dict()
    for o in seen:
        assert all(torch.equal(value, start[name] + o.client % 2) for name, value in o.parameters.items())
        assert o.training.optimizer == Adam(0.25 if o.client % 2 else 0.5)
        assert (o.training.epochs, o.training.local_steps) == (3, 1 if o.client % 2 else None)
        assert o.training.batch_size == 1
    assert seen[0].parameters is seen[2].parameters
    assert seen[1].parameters is seen[3].parameters
    assert len({row["start_offset"] for row in fedleak.CaptureStore.open(tmp_path).rows()}) == 2


def test_a_learning_rate_that_is_none_makes_the_update_unusable_and_stops_nothing(tmp_path):
    app, client = ServerApp(), ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        says = ConfigRecord({"lr": -1.0})
        content = {"arrays": message.content["arrays"], "m": MetricRecord({"num-examples": 1}), "client": says}
        return Message(RecordDict(content), reply_to=message)

    @app.main()
    def main(grid, context):
        strategy = fedleak.Eavesdropper(FedAvg(fraction_evaluate=0.0), tmp_path, model=their_model())
        strategy.start(grid, ArrayRecord(their_model().state_dict()), num_rounds=1)

    LocalEngine().run(app, client, 2)
    for o in fedleak.CaptureStore.open(tmp_path).load():
        assert o.error.startswith("bad update: UsageError: lr=-1.0 is no learning rate")
