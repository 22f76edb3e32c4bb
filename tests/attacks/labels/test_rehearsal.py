from dataclasses import replace

import pytest
import torch
from torch import nn

from fedleak.attacks.labels.last_layer import find_last_layer
from fedleak.attacks.labels.local_steps import _came_back, _full, _path, _updates
from fedleak.attacks.labels.posterior import Pool
from fedleak.attacks.labels.rehearsal import class_directions, per_class, read, trial
from fedleak.local_update import local_update
from fedleak.training import SGD


@pytest.mark.parametrize("optimizer", [SGD(0.1), SGD(0.05, momentum=0.9)])
@pytest.mark.parametrize("epochs", [1, 2])
def test_clients_simulated_together_are_the_ones_simulated_alone(optimizer, epochs, observe, lenet, knowing):
    model, generator = lenet(0, uniform=True), torch.Generator().manual_seed(0)
    images, labels = torch.rand(20, 1, 12, 12, generator=generator), torch.arange(20) % 10
    seen = observe(model, images[:12], labels[:12], steps=3, payload="weights", lr=0.1)
    seen = replace(seen, training=replace(seen.training, optimizer=optimizer, epochs=epochs))
    pick = torch.randint(20, (35, 12), generator=generator)
    together = list(_updates(seen, knowing(model), images, pick, labels[pick], seen.training))
    for place in (0, 31, 34):
        alone = local_update(model, seen.parameters, {}, images[pick[place]], labels[pick[place]], seen.training)
        for name, value in alone.update.items():
            torch.testing.assert_close(together[place][name], value, atol=1e-5, rtol=1e-4)


def test_models_whose_statistics_move_are_simulated_one_by_one(observe, knowing):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    images, labels = torch.rand(12, 1, 12, 12), torch.arange(12) % 10
    seen = observe(model, images, labels, steps=3, payload="weights", lr=0.1)
    pick = torch.arange(12)[None]
    found = list(_updates(seen, knowing(model), images, pick, labels[pick], seen.training))
    for name, value in seen.update.items():
        torch.testing.assert_close(found[0][name], value)


@pytest.mark.parametrize("payload", ["gradient", "weights"])
def test_what_came_of_a_client_is_the_model_it_came_back_with(payload, observe, lenet, knowing):
    model = lenet(1, uniform=True)
    images, labels = torch.rand(40, 1, 12, 12, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 10
    pick = torch.randperm(40)[None, :12]
    seen = observe(model, images[pick[0]], labels[pick[0]], steps=3, payload=payload, lr=0.1)
    knowledge, layer = knowing(model), find_last_layer(knowing(model))
    tried = trial(model, images, Pool(40, labels), 10)
    path = _path(seen, layer, knowledge, images, 20)
    _, outcomes = _full(seen, layer, knowledge, path, images, pick, labels[pick], 0, tried)
    own = tried.outcome(seen, _came_back(seen, seen.update))
    torch.testing.assert_close(outcomes[0], own, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(own[:, 0].sum(), torch.ones((), dtype=torch.float64))
    assert own.shape == (10, 5)
    assert trial(model, images, Pool(40, None), 10).outcome(seen, {}).shape == (10, 3)


def test_samples_of_a_class_scatter_evenly_in_the_coordinates_of_classes():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    centres = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    noise = torch.randn(600, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.5])
    white, along = class_directions(centres[labels] + noise, labels, 3)
    scatter = noise - torch.stack([noise[labels == label].mean(dim=0) for label in range(3)])[labels]
    even = (scatter @ white).T @ (scatter @ white) / 600
    torch.testing.assert_close(even, torch.eye(3, dtype=torch.float64), atol=0.15, rtol=0)
    torch.testing.assert_close(along.norm(dim=1), torch.ones(3, dtype=torch.float64))
    found = ((centres[labels] + noise - centres.mean(dim=0)) @ white @ along.T).argmax(dim=1)
    assert float((found == labels).double().mean()) > 0.9
    assert not class_directions(noise, None, 3)[1].any()


def test_a_reader_learns_counts_that_clients_readings_tell():
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(201, 4, generator=generator, dtype=torch.float64)
    shares = shares / shares.sum(dim=1, keepdim=True)
    about = shares[:, :, None] ** 2 * torch.ones(3, dtype=torch.float64)  # nothing linear
    logits, outcomes = torch.zeros(201, 5, 4), torch.zeros(201, 4, 3)
    readings = per_class(0 * shares, about, torch.eye(4, 3, dtype=torch.float64), logits, outcomes)
    found = read(readings[:200], shares[:200], readings[200], seed=0, steps=150)
    torch.testing.assert_close(found, shares[200], atol=0.06, rtol=0)
