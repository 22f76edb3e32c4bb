"""Toy parts from outside the package: each a class in the user's own file, and at most a line of configuration."""

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from fedleak.attacks import Attack, Knowledge, LabelGuess, LabelsOnly, Run, View
from fedleak.attacks.inversion import Elementwise, GradientMatching, Schedule, Start
from fedleak.attacks.labels import Random
from fedleak.attacks.problem import Problem, Target, pose
from fedleak.capture import CaptureInfo, CaptureStore
from fedleak.cli import main
from fedleak.defenses import Defense, Imitation
from fedleak.federation.adversary import Adversary
from fedleak.instantiate import instantiate
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


class Huber(Elementwise):
    """Squares of small differences, absolute values of large ones."""

    def elementwise(self, gap, target):
        each = [torch.nn.functional.huber_loss(g, torch.zeros_like(g), reduction="none") for g in gap.values()]
        return torch.stack([value.flatten(1).sum(1) for value in each]).sum(0)


class Stripes(Start):
    """Black and white columns, and noise from the second start on."""

    def images(self, problem, restart, noise, generator):
        return (torch.arange(noise.shape[-1]) % 2).expand(noise.shape) + 0.1 * restart * noise


class Race(Schedule):
    """All restarts at once; whoever falls behind drops out, and so do all others once one has arrived."""

    every = 10

    def __init__(self):
        self.most, self.behind = 0, set()

    def launch(self, standings, *, restarts, candidates):
        return [] if standings else [(restart, 0) for restart in range(restarts)]

    def drop(self, standings):
        going = [s for s in standings if s.reason is None]
        self.most = max(self.most, sum(s.evaluations > 0 for s in going))
        best = min(s.objective for s in standings)
        arrived = any(s.reason == "converged" for s in standings)
        behind = [s for s in going if s.evaluations >= 30 and s.objective > 2 * best]
        self.behind.update(behind)
        return going if arrived else behind


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


def inversion(**settings):
    return instantiate({"_target_": "fedleak.attacks.inversion.GradientMatching", **settings}, "attack.inversion")


def guess(labels):
    return LabelGuess(labels[None], torch.ones(1))


def test_an_objective_that_compares_element_by_element(observe, outside):
    observation, images, labels = observe()
    mine = inversion(objective={"_target_": "my_parts.Huber"}, restarts=1, max_evaluations=100)
    (result,) = mine.invert([observation], [guess(labels)], KNOWLEDGE, Run())
    assert (result.images - images).square().mean() < 0.03  # 0.27 at the start


def test_a_start(observe, outside):
    observation, _, labels = observe()
    mine = inversion(start={"_target_": "my_parts.Stripes"}, restarts=1, max_evaluations=2, trace_every=1)
    (result,) = mine.invert([observation], [guess(labels)], KNOWLEDGE, Run())
    assert torch.equal(result.snapshots[0][1][0, 0, 5], (torch.arange(28) % 2).half())


def test_a_schedule_that_runs_restarts_side_by_side_and_looks_across_them(observe):
    observation, images, labels = observe()
    race = Race()
    together = GradientMatching(schedule=race, restarts=3, tolerance=1e-3)
    (result,) = together.invert([observation], [guess(labels)], KNOWLEDGE, Run())
    assert (result.stop_reason, result.restarts, race.most) == ("converged", 3, 3)
    assert (result.images - images).square().mean() < 0.03
    assert race.behind


def test_two_updates_of_one_batch():
    shape, classes = (1, 4, 2), 3
    layers = torch.nn.Conv2d(1, 1, 2, stride=2), torch.nn.Sigmoid(), torch.nn.Flatten(), torch.nn.Linear(2, classes)
    model = torch.nn.Sequential(*layers)
    torch.manual_seed(2)
    image, label, training = torch.rand(1, *shape), torch.tensor([1]), LocalTraining(batch_size=1, local_steps=1)
    targets = []
    for _ in range(2):  # each says 2 features and 4 sums of pixels, of 8 pixels
        parameters = {name: torch.randn(value.shape) for name, value in model.named_parameters()}
        update = local_update(model, parameters, {}, image, label, training).update
        targets.append(Target(parameters, {}, update, training))
    search = GradientMatching(dtype="float64", start="grey", tolerance=1e-12, restarts=1, max_evaluations=500)
    error = []
    for seen in (targets[:1], targets):
        problem = Problem(0, (1, 0, 0), tuple(seen), 1, label[None])
        found = search.solve([problem], Knowledge(model, shape, classes), Run())[0]
        error.append(float((found.images - image).square().mean()))
    assert error[1] < 1e-6 < 1e-3 < error[0]
