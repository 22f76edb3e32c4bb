"""Toy parts from outside the package: each a class in the user's own file, and at most a line of configuration."""

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from fedleak.attacks import Attack, Knowledge, LabelsOnly, View
from fedleak.attacks.labels import Random
from fedleak.attacks.problem import pose
from fedleak.capture import CaptureInfo, CaptureStore
from fedleak.cli import main
from fedleak.defenses import Defense, Imitation
from fedleak.federation.adversary import Adversary
from fedleak.local_update import local_update
from fedleak.models import LeNet
from fedleak.training import ClientOptimizer, LocalTraining, unroll

KNOWLEDGE = Knowledge(LeNet((1, 28, 28), 10), (1, 28, 28), 10)


@dataclass(frozen=True)
class SignSGD(ClientOptimizer):
    """Steps of one size, with a little of the last one."""

    memory: float = 0.5

    def init(self, weights):
        return {name: torch.zeros_like(value) for name, value in weights.items()}

    def step(self, state, weights, gradient):
        state = {name: self.memory * state[name] + value.sign() for name, value in gradient.items()}
        return state, {name: weights[name] - self.lr * value for name, value in state.items()}


class Halves(Defense):
    """Sends half of everything."""

    def apply(self, update, *, generator):
        return {name: value / 2 for name, value in update.items()}

    def imitate(self, observed, training):
        return Imitation(lambda update: {n: v / 2 for n, v in update.items()}, dict.fromkeys(observed, 0.0))


class Twice(View):
    """Sums every two clients of a round, and nothing more."""

    def __call__(self, observations):
        return [
            replace(a, update={n: (a.update[n] + b.update[n]) / 2 for n in a.update}, clients=(a.client, b.client))
            for a, b in zip(observations[::2], observations[1::2], strict=True)
        ]

    def training(self, training):
        return replace(training, batch_size=2 * training.batch_size)


class Blinds(Adversary):
    """Sends every client a model without its last bias."""

    def send(self, round, client, state):
        return {**state, "fc.bias": torch.zeros_like(state["fc.bias"])}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """This file as a module of the user's own."""
    (tmp_path / "my_parts.py").write_text(Path(__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_client_optimiser(observe, outside):
    import my_parts

    observation, images, labels = observe(2, local_steps=2, payload="weights")
    training = LocalTraining("weights", 2, 2, epochs=2, optimizer=my_parts.SignSGD(0.01, memory=0.25))
    sent = local_update(KNOWLEDGE.model, observation.parameters, {}, images, labels, training).update
    moved = {(sent[n] - value).abs().max() for n, value in observation.parameters.items()}
    assert 0.01 < float(max(moved)) < 4 * 0.02
    store = CaptureStore.create(outside / "captures", CaptureInfo())
    store.write(replace(observation, update=sent, training=training))
    [read] = CaptureStore.open(outside / "captures").load()
    assert read.training == training
    again = unroll(lambda step, weights: weights, read.parameters, read.training)
    assert list(again) == list(sent)


def test_a_defense_with_an_imitation(observe):
    observation, _, _ = observe(2)
    (problem,) = pose([observation], [None], replace(KNOWLEDGE, defense=Halves()))
    (target,) = problem.targets
    made = target.imitate(target.update)
    assert all(torch.equal(made[name], value / 2) for name, value in target.update.items())


def test_a_view_that_sums_two_clients(observe):
    seen = [replace(observe(2, seed=0)[0], client=client) for client in range(4)]
    found = Attack(Random(), LabelsOnly(), view=Twice())(seen, KNOWLEDGE)
    assert [r.client for r in found] == [0, 2]


def test_an_adversary_that_alters_the_parameters(outside):
    run = ["run", "federation.rounds=1", "federation.clients=2", "federation.batch_size=1", "attack=labels_only"]
    assert main([*run, "adversary._target_=my_parts.Blinds", f"output_dir={outside / 'run'}"]) == 0
    for observation in CaptureStore.open(outside / "run" / "captures").load():
        assert not observation.parameters["fc.bias"].any()
    assert (pd.read_csv(outside / "run" / "attacks.csv").update_residual < 1e-5).all()
