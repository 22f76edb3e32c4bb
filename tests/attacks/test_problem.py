"""What observations become for an inversion."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedleak.attacks.base import Knowledge, LabelGuess
from fedleak.attacks.problem import pose
from fedleak.capture import Observation
from fedleak.defenses import Chain, Defense, Gaussian, Pruning
from fedleak.errors import UsageError
from fedleak.training import SGD, Adam, LocalTraining

TRAINING = LocalTraining("gradient", 3, 2, optimizer=SGD(0.5))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 5))


KNOWLEDGE = Knowledge(model(), (1, 2, 2), 5)
START = {name: value.detach() for name, value in model().named_parameters()}
GRADIENT = {name: torch.randn(value.shape) for name, value in START.items()}


def observation(training=TRAINING, **more) -> Observation:
    update = {name: 2 * value for name, value in reversed(GRADIENT.items())}
    if training.payload == "weights":
        update = {name: START[name] - 0.5 * value for name, value in update.items()}
    return Observation(4, 7, START, update, training, start_buffers={"mean": torch.ones(1)}, **more)


def guess(*labels, features=None) -> LabelGuess:
    return LabelGuess(torch.tensor([labels, labels]), torch.ones(2), features)


@pytest.mark.parametrize("payload", ["gradient", "weights"])
def test_one_update_is_one_problem_with_the_mean_gradient(payload):
    features = torch.rand(6, 4)
    seen = observation(replace(TRAINING, payload=payload))
    (problem,) = pose([seen], [guess(0, 1, 2, 3, 3, 4, features=features)], KNOWLEDGE)
    assert (problem.index, problem.key, problem.samples) == (0, (4, 7, 0), 6)
    assert problem.labels.shape == (2, 6)
    assert problem.features is features
    assert problem.start is None
    (target,) = problem.targets
    assert (target.training, target.imitate, target.noise) == (seen.training, None, None)
    assert list(target.update) == list(START), "in the model's order"
    assert target.buffers == seen.start_buffers
    for name, value in GRADIENT.items():
        torch.testing.assert_close(target.update[name], value)
        assert torch.equal(target.parameters[name], START[name])


def test_without_a_guess_the_samples_are_those_of_an_epoch():
    (problem,) = pose([observation(replace(TRAINING, epochs=5))], [None], KNOWLEDGE)
    assert problem.labels is None
    assert problem.samples == 6


def test_shared_samples_are_a_problem_each_with_the_label_that_is_theirs():
    rows = -torch.eye(5)[torch.tensor([3, 0, 3])]
    update = {"1.weight": rows[..., None].expand(-1, -1, 4), "1.bias": rows}
    seen = Observation(1, 2, START, update, LocalTraining("gradient", 3, 1, per_sample=True))
    bad = replace(seen, error="sent NaN")
    problems = pose([bad, seen], [None, guess(0, 3, 3)], KNOWLEDGE)
    assert [(p.index, p.key, p.samples) for p in problems] == [(1, (1, 2, sample), 1) for sample in range(3)]
    assert [p.labels.tolist() for p in problems] == [[[3]], [[0]], [[3]]]
    assert all(p.targets[0].training == LocalTraining("gradient", 1, 1) for p in problems)
    assert torch.equal(problems[1].targets[0].update["1.bias"], rows[1])


@pytest.mark.parametrize("payload", ["gradient", "weights"])
def test_a_known_defense_is_imitated_in_the_units_of_the_mean_gradient(payload):
    knowledge = replace(KNOWLEDGE, defense=Chain([Pruning(0.5), Gaussian(0.25)]))
    seen = observation(replace(TRAINING, payload=payload))
    (problem,) = pose([seen], [None], knowledge)
    (target,) = problem.targets
    made = target.imitate({name: value + 1e-3 for name, value in target.update.items()})
    for name, value in target.update.items():
        kept = made[name] != 0
        assert int(kept.sum()) == -(-value.numel() // 2)
        torch.testing.assert_close(made[name][kept], value[kept] + 1e-3)
        # The change is two gradients, or the weights moved by the learning rate times that.
        scale = 2 if payload == "gradient" else 1
        assert target.noise[name][kept].unique().tolist() == pytest.approx([0.25 / scale])


def test_a_defense_is_not_imitated_where_the_units_or_the_defense_are_not_known():
    knowledge = replace(KNOWLEDGE, defense=Gaussian(0.1))
    blind = replace(TRAINING, payload="weights", optimizer=None)
    assert pose([observation(blind)], [None], knowledge)[0].targets[0].noise is None

    class Secret(Defense):
        def imitate(self, observed, training):
            return None

    knowledge = replace(KNOWLEDGE, defense=Secret())
    assert pose([observation()], [None], knowledge)[0].targets[0].imitate is None


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="1 observations but 0 label guesses"):
        pose([observation()], [], KNOWLEDGE)
    with pytest.raises(UsageError, match=r"local steps.*round 4 client 7.*threat\.hyperparameters=true"):
        pose([observation(replace(TRAINING, local_steps=None))], [guess(1)], KNOWLEDGE)
    with pytest.raises(UsageError, match=r"threat\.batch_size=true"):
        pose([observation(replace(TRAINING, batch_size=None))], [None], KNOWLEDGE)
    other = replace(observation(), update={"1.bias": torch.zeros(5)})
    with pytest.raises(UsageError, match="the model it was trained with"):
        pose([other], [None], KNOWLEDGE)


def test_weights_after_another_optimiser_are_minus_their_change():
    seen = observation(replace(TRAINING, payload="weights", optimizer=Adam(0.1)))
    (problem,) = pose([seen], [None], KNOWLEDGE)
    for name, value in problem.targets[0].update.items():
        assert torch.equal(value, START[name] - seen.update[name])
