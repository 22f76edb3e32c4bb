"""Clients that take several local steps, or train on one batch again and again."""

from dataclasses import replace

import pytest
import torch

from fedleak.attacks import Attack, Knowledge, LabelGuess
from fedleak.attacks.base import Run
from fedleak.attacks.inversion import L2, LBFGS, GradientMatching, Joint, Surrogate, Unrolled
from fedleak.attacks.inversion.local_steps import arranged
from fedleak.attacks.labels import Known
from fedleak.attacks.problem import pose
from fedleak.capture import Observation
from fedleak.errors import UsageError
from fedleak.local_update import local_update
from fedleak.models import LeNet
from fedleak.threat import ThreatModel
from fedleak.training import SGD, Adam, LocalTraining

SHAPE = (1, 8, 8)
TUNED = {
    "objective": L2(relative=True),
    "start": "grey",
    "smoothness": 1.0,
    "optimizer": LBFGS(max_step=1.0),
    "restarts": 1,
    "dtype": "float64",
}


def network(seed=0):
    torch.manual_seed(seed)
    model = LeNet(SHAPE, 3).double()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    return model


KNOWN = Knowledge(network(), SHAPE, 3)


def sent(training, images, labels, *, round=1, seed=0):
    start = {name: value.detach().clone() for name, value in network(seed).named_parameters()}
    update = local_update(network(), start, {}, images, labels, training).update
    return Observation(round, 0, start, update, training)


def batch(count):
    random = torch.Generator().manual_seed(1)
    x = torch.linspace(0, 1, 8, dtype=torch.float64)
    waves = [torch.rand(4, generator=random, dtype=torch.float64) for _ in range(count)]
    images = [0.5 + 0.25 * torch.sin(6 * w[0] * x)[:, None] + 0.2 * torch.cos(6 * w[1] * x + w[2])[None] for w in waves]
    return torch.stack(images)[:, None], torch.arange(count) % 3


def guess(labels):
    return LabelGuess(labels.sort().values[None], torch.ones(1))


def error(found, images):
    gaps = (found.images.double()[:, None] - images[None]).square().flatten(2).mean(2)
    return float(gaps.min(0).values.mean())


@pytest.mark.parametrize("payload", ["gradient", "weights"])
def test_one_step_through_the_loop_is_one_batch(payload):
    training = LocalTraining(payload, 2, 1, optimizer=SGD(0.5))
    images, labels = batch(2)
    observation = sent(training, images, labels)
    settings = {**TUNED, "max_evaluations": 30, "general": True}
    one, loop = (
        kind(**settings).invert([observation], [guess(labels)], KNOWN, Run())[0]
        for kind in (GradientMatching, Unrolled)
    )
    torch.testing.assert_close(one.images, loop.images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("optimizer", [SGD(0.1, 0.9), Adam(0.02)], ids=str)
def test_the_client_s_own_loop_gives_the_images_that_one_batch_does_not(optimizer):
    training = LocalTraining("weights", 1, 2, epochs=2, optimizer=optimizer)
    images, labels = batch(2)
    observation = sent(training, images, labels)
    settings = {**TUNED, "max_evaluations": 150, "tolerance": 1e-9}
    one, loop = (
        error(kind(**settings).invert([observation], [guess(labels)], KNOWN, Run())[0], images)
        for kind in (GradientMatching, Unrolled)
    )
    assert loop < 5e-3
    assert loop < 0.3 * one


def test_labels_are_spread_over_the_steps_first():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    observation = sent(LocalTraining("weights", 3, 2, optimizer=SGD(0.1)), *batch(6))
    (problem,) = pose([observation], [guess(labels)], KNOWN)
    found = arranged(problem, 1, 4, 0).labels
    assert found[0].tolist() == [0, 1, 2, 0, 1, 2]
    assert all(row.sort().values.tolist() == labels.tolist() for row in found)
    assert len({tuple(row.tolist()) for row in found}) > 1
    alone = replace(problem, targets=(replace(problem.targets[0], training=LocalTraining(local_steps=1)),))
    assert arranged(alone, 1, 4, 0) is alone


def test_a_point_on_the_way_explains_long_steps_better_than_their_start():
    training = LocalTraining("weights", 1, 4, optimizer=SGD(0.5))
    images, labels = batch(4)
    observation = sent(training, images, labels)
    settings = {**TUNED, "max_evaluations": 240}
    start, path = (
        kind(**settings).invert([observation], [guess(labels)], KNOWN, Run())[0]
        for kind in (GradientMatching, Surrogate)
    )
    assert path.objective < start.objective
    assert 0 < path.details["point"] <= 1
    assert path.evaluations <= 240


def test_a_surrogate_of_one_step_is_matched_where_it_started():
    images, labels = batch(2)
    observation = sent(LocalTraining("gradient", 2, 1, optimizer=SGD(0.5)), images, labels)
    (found,) = Surrogate(**TUNED, max_evaluations=60, rounds=1).invert([observation], [guess(labels)], KNOWN, Run())
    (plain,) = GradientMatching(**TUNED, max_evaluations=60).invert([observation], [guess(labels)], KNOWN, Run())
    assert torch.equal(found.images, plain.images)
    broken = replace(observation, error="client error")
    assert Surrogate(**TUNED).invert([broken], [None], KNOWN, Run())[0].stop_reason == "client error"


def test_joint_with_one_update_is_the_single_attack_bit_for_bit():
    images, labels = batch(2)
    observation = sent(LocalTraining("gradient", 2, 1, optimizer=SGD(0.5)), images, labels)
    settings = {**TUNED, "max_evaluations": 40}
    one, joint = (
        kind(**settings).invert([observation], [guess(labels)], KNOWN, Run())[0] for kind in (GradientMatching, Joint)
    )
    assert torch.equal(one.images, joint.images)
    assert one.objective == joint.objective
    assert one.evaluations == joint.evaluations


def test_several_updates_of_one_batch_are_one_problem():
    images, labels = batch(2)
    training = LocalTraining("gradient", 2, 1, optimizer=SGD(0.5))
    seen = [sent(training, images, labels, round=r, seed=r) for r in (2, 1)]
    broken = replace(seen[0], round=3, error="client error")
    told = {}
    wrong = LabelGuess(torch.tensor([[0, 0]]), torch.ones(1))
    guesses = [guess(labels), wrong, None]
    attack = Joint(**TUNED, max_evaluations=150, tolerance=1e-12, candidates=2)
    later, first, none = attack.invert([*seen, broken], guesses, KNOWN, Run(on_result=told.__setitem__))
    assert torch.equal(first.images, later.images)
    assert (first.round, later.round, later.evaluations) == (1, 2, 0)
    assert first.details["updates"] == 2
    assert error(first, images) < 1e-3
    assert none.stop_reason == "client error"
    assert set(told) == {0, 1, 2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Unrolled(orders=0), r"inversion\.orders=0"),
        (lambda: Surrogate(rounds=0), r"inversion\.rounds=0"),
        (lambda: Surrogate(point=1.5), r"inversion\.point=1\.5"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_without_the_client_s_settings_it_says_what_is_missing():
    attack = Attack(Known(), Unrolled(**TUNED), name="fedavg")
    with pytest.raises(
        UsageError, match=r"attack=fedavg \(Unrolled\) needs hyperparameters.*threat.hyperparameters=true"
    ):
        attack.check(ThreatModel(labels=True, hyperparameters=False))
