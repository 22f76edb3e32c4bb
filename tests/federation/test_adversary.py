"""A server that alters what it sends: the clients train it, the captures hold it, the self-check agrees."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from fedleak.capture import CaptureStore
from fedleak.cli import main
from fedleak.federation.adversary import Adversary
from fedleak.federation.scenario import build_scenario, shared_model
from fedleak.pipeline import attacker_knowledge
from fedleak.setup import compose

CHEAP = ["attack=labels_only", "attack/labels=llg", "limit=off"]
RUN = ["run", "federation.rounds=2", "federation.clients=3", "federation.batch_size=2", *CHEAP]


class Marks(Adversary):
    """Prepares a constant bias, and sends client 1 one of its own."""

    def prepare(self, model: nn.Module) -> nn.Module:
        nn.init.constant_(model.fc.bias, 0.25)
        return model

    def send(self, round, client, state):
        return {**state, "fc.bias": state["fc.bias"] + round} if client == 1 else state


@pytest.mark.parametrize("federation", ["fedsgd", "fedavg"])
def test_what_is_sent_is_what_is_trained_and_captured(tmp_path, monkeypatch, federation):
    (tmp_path / "marking.py").write_text(Path(__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "run"
    adversary = "adversary._target_=marking.Marks"
    assert main([*RUN, f"federation={federation}", adversary, f"output_dir={folder}"]) == 0
    store = CaptureStore.open(folder / "captures")
    seen = {(o.round, o.client): o for o in store.load()}
    assert torch.equal(seen[1, 0].parameters["fc.bias"], torch.full((10,), 0.25))
    assert seen[1, 0].parameters is seen[1, 2].parameters
    for number in (1, 2):
        honest, altered = seen[number, 0].parameters, seen[number, 1].parameters
        assert torch.equal(altered["fc.bias"], honest["fc.bias"] + number)
        assert torch.equal(altered["fc.weight"], honest["fc.weight"])
    assert len({row["start_offset"] for row in store.rows() if row["round"] == 1}) == 2, "each distinct model once"
    attacks = pd.read_csv(folder / "attacks.csv")
    assert (attacks.update_residual < 1e-5).all()
    setup = compose([*RUN[1:], adversary])
    assert torch.equal(attacker_knowledge(setup, store).model.fc.bias, torch.full((10,), 0.25))


def test_an_honest_server_is_the_default_and_changes_nothing():
    setup = compose([])
    made = build_scenario(setup)
    assert type(made.adversary) is Adversary
    state = {"w": torch.ones(1)}
    assert made.adversary.send(1, 0, state) is state
    model = shared_model(setup, (1, 28, 28), 10, 0)
    assert made.adversary.prepare(model) is model
