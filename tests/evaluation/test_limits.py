"""The limit of a run's updates: beside what was reached, and only where it is meant."""

from dataclasses import replace

import torch

from fedleak.attacks import Knowledge
from fedleak.capture import Observation
from fedleak.defenses import Gaussian, NoDefense
from fedleak.evaluation.limits import limits_of
from fedleak.local_update import local_update
from fedleak.models.lenet import LeNet
from fedleak.seeding import plain_generator
from fedleak.training import SGD, LocalTraining
from fedleak.truth import Truth

SHAPE = (1, 12, 12)
TRAINING = LocalTraining(batch_size=2, local_steps=1, optimizer=SGD(0.1))
KNOWLEDGE = Knowledge(LeNet(SHAPE, 10), SHAPE, 10)


def update(client: int, training: LocalTraining = TRAINING) -> tuple[Observation, Truth]:
    generator = plain_generator(client)
    start = {n: torch.rand(p.shape, generator=generator) - 0.5 for n, p in KNOWLEDGE.model.named_parameters()}
    images, labels = torch.rand(2, *SHAPE, generator=generator), torch.tensor([1, 2])
    sent = local_update(KNOWLEDGE.model, start, {}, images, labels, training).update
    return Observation(1, client, start, sent, training), Truth(1, client, images, labels)


def test_noise_raises_the_limit_and_payload_does_not_matter_to_it():
    observation, truth = update(0)
    clean = limits_of([observation], [truth], KNOWLEDGE, TRAINING, NoDefense())[0]
    noisy = limits_of([observation], [truth], KNOWLEDGE, TRAINING, Gaussian(0.1))[0]
    assert float(clean.mse.max()) < 1e-6 < 1e-3 < float(noisy.mse.min())
    weights = replace(TRAINING, payload="weights")
    sent, truth = update(0, weights)
    # the same noise on weights is 1 / lr times as much on the gradient
    other = limits_of([sent], [truth], KNOWLEDGE, weights, Gaussian(0.01))[0]
    torch.testing.assert_close(other.mse, noisy.mse, rtol=1e-3, atol=0)


def test_updates_without_a_truth_or_in_error_have_no_limit():
    observation, truth = update(0)
    broken = replace(observation, error="client error", update={})
    found = limits_of([observation, broken, update(1)[0]], [truth, truth, None], KNOWLEDGE, TRAINING, NoDefense())
    assert list(found) == [0]
