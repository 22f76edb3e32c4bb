"""Maximum a posteriori inversion: it finds the images, says whether it did, and how wrong it expects to be."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedleak.attacks.base import Knowledge, LabelGuess, Run
from fedleak.attacks.image_prior import natural_prior
from fedleak.attacks.inversion import MAP
from fedleak.attacks.inversion.map import attack as map_attack
from fedleak.attacks.results import Reconstruction
from fedleak.capture import Observation
from fedleak.errors import UsageError
from fedleak.models.lenet import LeNet
from fedleak.seeding import plain_generator
from fedleak.training import LocalTraining

SHAPE = (1, 12, 12)


def images_like(count: int, seed: int) -> torch.Tensor:
    prior = natural_prior(SHAPE)
    drawn = torch.randn(count, 144, generator=plain_generator(seed), dtype=torch.float64)
    return prior.images(drawn).clamp(0, 1).float()


def victim(seed: int, batch: int = 1, std: float = 0.0) -> tuple[Observation, LabelGuess, torch.Tensor]:
    generator = plain_generator(seed)
    model = LeNet(SHAPE, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    images, labels = images_like(batch, seed), torch.randperm(10, generator=generator)[:batch].sort().values
    gradients = torch.autograd.grad(cross_entropy(model(images), labels), list(model.parameters()))
    start = {name: parameter.detach() for name, parameter in model.named_parameters()}
    update = {n: g + std * torch.randn(g.shape, generator=generator) for n, g in zip(start, gradients, strict=True)}
    observation = Observation(1, seed, start, update, LocalTraining(batch_size=batch, local_steps=1))
    return observation, LabelGuess(labels[None], torch.ones(1)), images


def attack(victims: list[tuple[Observation, LabelGuess, torch.Tensor]], **settings) -> list[Reconstruction]:
    knowledge = Knowledge(LeNet(SHAPE, 10), SHAPE, 10)
    return MAP(**settings).invert([v[0] for v in victims], [v[1] for v in victims], knowledge, Run())


def error(found: Reconstruction, truth: torch.Tensor) -> torch.Tensor:
    return (found.images - truth).double().square().flatten(1).mean(1)


def test_single_images_and_batches_come_back_to_rounding():
    victims = [victim(0), victim(1), victim(2, batch=2)]
    for found, (_, _, truth) in zip(attack(victims), victims, strict=True):
        assert found.converged
        assert float(error(found, truth).max()) < 1e-8
        assert max(found.details["expected_mse"]) < 1e-8


def twins() -> tuple[Observation, LabelGuess, torch.Tensor]:
    """Two images of one label, whose gradients are hard to tell apart."""
    observation, _, images = victim(2, batch=2)
    model = LeNet(SHAPE, 10)
    model.load_state_dict(dict(observation.parameters))
    labels = torch.tensor([3, 3])
    gradients = torch.autograd.grad(cross_entropy(model(images), labels), list(model.parameters()))
    update = dict(zip(observation.parameters, gradients, strict=True))
    return replace(observation, update=update), LabelGuess(labels[None], torch.ones(1)), images


def test_twins_are_told_apart():
    one = twins()
    (found,) = attack([one])
    assert found.converged
    assert min(float(error(found, truth).max()) for truth in (one[2], one[2].flip(0))) < 1e-8


def test_through_noise_the_error_is_the_one_it_expects():
    victims = [victim(seed, std=0.05) for seed in range(8)]
    ratios, worst = [], 0.0
    for found, (_, _, truth) in zip(attack(victims), victims, strict=True):
        assert found.converged  # the noise was not granted, and is seen in the update
        assert found.details["noise_std"] == pytest.approx(0.05, rel=0.15)
        ratios.append(float(error(found, truth)) / found.details["expected_mse"][0])
        worst = max(worst, float(error(found, truth)))
    assert 0.4 < sorted(ratios)[4] < 2.5
    assert worst < 0.08  # the prior's own variance


def test_one_alone_is_what_it_is_among_others():
    victims = [victim(3, std=0.05), victim(4, std=0.05)]
    together, alone = attack(victims), attack(victims[:1])
    torch.testing.assert_close(together[0].images, alone[0].images, atol=2e-3, rtol=0)


def test_an_update_that_is_not_finite_changes_no_other():
    bad, label, _ = victim(5)
    broken = {name: torch.full_like(value, torch.nan) for name, value in bad.update.items()}
    bad = Observation(1, 5, bad.parameters, broken, bad.training)
    good = victim(6)
    found = attack([(bad, label, good[2]), good])
    assert found[0].stop_reason == "diverged"
    assert float(error(found[1], good[2])) < 1e-8


def test_an_update_of_noise_gives_nothing_and_says_so():
    observation, guess, truth = victim(7)
    noise = {
        name: torch.randn(value.shape, generator=plain_generator(9)) * value.square().mean().sqrt()
        for name, value in observation.update.items()
    }
    found = attack([(Observation(1, 7, observation.parameters, noise, observation.training), guess, truth)])[0]
    assert found.stop_reason == "no_signal"
    torch.testing.assert_close(found.images, torch.full_like(found.images, 0.5))  # the prior's mean
    assert found.details["expected_mse"][0] == pytest.approx(float(natural_prior(SHAPE).variance.mean()), rel=1e-3)


def test_what_is_pruned_away_counts_as_unknown_in_the_error_it_expects():
    observation, guess, truth = victim(0)
    kept = {n: v * (v.abs() >= v.abs().flatten().quantile(0.99)) for n, v in observation.update.items()}
    found = attack([(replace(observation, update=kept), guess, truth)], restarts=1)[0]
    assert 1e-4 < found.details["expected_mse"][0] < 0.09
    assert 0.05 < float(error(found, truth)) / found.details["expected_mse"][0] < 20


def test_when_time_is_short_every_update_has_an_answer_from_its_leading_coordinates(monkeypatch):
    monkeypatch.setattr(map_attack, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(map_attack, "_QUICK", 100)
    monkeypatch.setattr(map_attack, "_usable", lambda *_: None)  # no peeled images to start from
    victims = [victim(2, batch=2), victim(3, batch=2)]
    for found, (_, _, truth) in zip(attack(victims, seconds=1e-6), victims, strict=True):
        assert found.stop_reason == "budget"
        assert found.evaluations > 0
        assert float(error(found, truth).max()) < 0.2
    for found, (_, _, truth) in zip(attack(victims, seconds=600), victims, strict=True):
        assert found.converged
        assert float(error(found, truth).max()) < 1e-8


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(UsageError, match=r"inversion\.restarts=0"):
        MAP(restarts=0)
    with pytest.raises(UsageError, match=r"inversion\.seconds=0"):
        MAP(seconds=0)
    with pytest.raises(UsageError, match=r"inversion\.prior=best"):
        MAP(prior="best")
    with pytest.raises(UsageError, match="needs labels"):
        MAP().invert([victim(0)[0]], [None], Knowledge(LeNet(SHAPE, 10), SHAPE, 10), Run())
