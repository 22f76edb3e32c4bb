"""Replies of any form: an error row for that client, and the federation goes on with the rest."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

import fedleak
from fedleak.attacks import Attack, Knowledge, LabelsOnly
from fedleak.attacks.labels import Random
from fedleak.federation.claims import arrays_of
from fedleak.federation.engine import LocalEngine
from fedleak.federation.records import to_arrays, to_tensors
from fedleak.federation.strategy import Repeatable
from fedleak.models import LeNet

NAN = float("nan")


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))


def start() -> dict[str, torch.Tensor]:
    return {name: value for name, value in model().state_dict().items() if value.is_floating_point()}


BUFFERS = [name for name, _ in model().named_buffers() if "num" not in name]


def changed(**values) -> ArrayRecord:
    return to_arrays({**start(), **values})


def cast(dtype) -> ArrayRecord:
    return ArrayRecord({name: Array(value.numpy().astype(dtype)) for name, value in start().items()})


HOSTILE = {
    "nan": {"arrays": changed(**{"0.weight": torch.full((4, 3), NAN)})},
    "nan in a buffer": {"arrays": changed(**{"1.running_mean": torch.full((4,), NAN)})},
    "shape of a buffer": {"arrays": changed(**{"1.running_var": torch.ones(7)})},
    "float64": {"arrays": cast(np.float64)},
    "complex": {"arrays": cast(np.complex64)},
    "integers": {"arrays": cast(np.int64)},
    "another": {"arrays": to_arrays({"x": torch.ones(77)})},
    "no arrays": {"arrays": None},
    "no metrics": {"metrics": None},
    "negative examples": {"metrics": {"num-examples": -5, "train_loss": 1.0}},
    "zero examples": {"metrics": {"num-examples": 0, "train_loss": 1.0}},
    "absurd examples": {"metrics": {"num-examples": 10**15, "train_loss": 1.0}},
    "nan examples": {"metrics": {"num-examples": NAN, "train_loss": 1.0}},
    "list of examples": {"metrics": {"num-examples": [1, 2], "train_loss": 1.0}},
}
ONLY_SEEN = {  # the average has no use for what is wrong here
    "text for lr": {"client": {"partition-id": 0, "lr": "\x1b[2Jfast"}},
    "nan lr": {"client": {"partition-id": 0, "lr": NAN}},
    "list of lr": {"client": {"partition-id": 0, "lr": [0.1]}},
    "no steps": {"client": {"partition-id": 0, "local-steps": 0}},
    "absurd steps": {"client": {"partition-id": 0, "local-steps": 10**12}},
    "half steps": {"client": {"partition-id": 0, "local-steps": 1.5}},
    "labels of text": {"client": {"partition-id": 0, "labels": ["a"]}},
    "labels that are none": {"client": {"partition-id": 0, "labels": [5]}},
}


def content(said: dict, number: int) -> RecordDict:
    said = {"arrays": changed(), "metrics": {"num-examples": 4, "train_loss": 1.0}, "client": {}, **said}
    records = {"arrays": said["arrays"]} if said["arrays"] is not None else {}
    if said["metrics"] is not None:
        records["metrics"] = MetricRecord(said["metrics"])
    return RecordDict({**records, "client": ConfigRecord({"partition-id": number, **said["client"]})})


def federate(folder, said: dict, *, hostile: int = 0, clients: int = 3, rounds: int = 1):
    """A federation whose node `hostile` says `said`; returns the captures and the final model."""
    app, server, result = ClientApp(), ServerApp(), []

    def me(context: Context) -> int:
        return int(context.node_config["partition-id"])

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict({"client": ConfigRecord({"partition-id": me(context)})}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(content(said if me(context) == hostile else {}, me(context)), reply_to=message)

    @server.main()
    def main(grid, context):
        inner = Repeatable(FedAvg(), clients=clients, fraction=1.0, seed=0, buffers=BUFFERS, most_examples=100)
        threat = fedleak.ThreatModel(labels=True)
        strategy = fedleak.Eavesdropper(inner, folder, model=model(), threat=threat, classes=2, client_of=None)
        result.append(strategy.start(grid, to_arrays(start()), num_rounds=rounds).arrays)

    LocalEngine().run(server, app, clients)
    return fedleak.CaptureStore.open(folder).load(), to_tensors(result[0])


@pytest.mark.parametrize("name", [*HOSTILE, *ONLY_SEEN])
def test_a_hostile_reply_is_an_error_row_and_the_rest_goes_on(tmp_path, name, caplog):
    seen, final = federate(tmp_path, {**HOSTILE, **ONLY_SEEN}[name])
    if name not in ("no metrics",):  # of which the eavesdropper has no need
        assert [o.client for o in seen if o.error is not None] == [0]
        assert seen[0].error.startswith(("bad update: ", "bad reply: "))
        assert seen[0].error.isprintable()
    assert len(seen) == 3
    assert all(torch.allclose(value, start()[n]) for n, value in final.items()), "averaged with a poisoned reply"
    assert ("client 0 left out" in caplog.text) == (name in HOSTILE)


def test_control_variates_are_not_the_update(tmp_path):
    both = RecordDict({"variates": to_arrays({n: v + 9 for n, v in start().items()}), "arrays": changed()})
    reply = Message(both, dst_node_id=1, message_type="train")
    assert torch.equal(to_tensors(arrays_of(reply, "arrays", start()))["0.bias"], start()["0.bias"])


def test_a_number_that_is_anothers_is_not_believed(tmp_path):
    seen, _ = federate(tmp_path, {"client": {"partition-id": 1}}, hostile=2)
    assert len({o.client for o in seen}) == 3
    assert [o.error for o in seen if o.error] == ["bad reply: partition-id=1 is another node's"]


def test_what_claims_terabytes_is_not_attacked_and_the_others_are(observe):
    sane = observe(2)[0]
    huge = replace(sane, client=1, training=replace(sane.training, batch_size=10**9))
    found = Attack(Random(), LabelsOnly())([huge, sane], Knowledge(LeNet((1, 28, 28), 10), (1, 28, 28), 10))
    assert found[0].stop_reason.startswith("claims 1000000000 samples")
    assert len(found[1].labels) == 2
