"""Derivatives through a client's local steps, against plain automatic differentiation of the same loop."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedleak.attacks import Knowledge, LabelGuess
from fedleak.attacks.base import Run
from fedleak.attacks.chain import read_layers
from fedleak.attacks.image_prior import prior_of_images
from fedleak.attacks.inversion import MAP
from fedleak.attacks.inversion.map.order import in_order
from fedleak.attacks.jacobian import loop
from fedleak.attacks.jacobian.chain import ChainModel
from fedleak.attacks.jacobian.general import GeneralModel
from fedleak.attacks.jacobian.loop import LoopModel
from fedleak.attacks.jacobian.models import update_model
from fedleak.attacks.problem import Target, pose
from fedleak.capture import Observation
from fedleak.local_update import local_update
from fedleak.models import LeNet
from fedleak.threat import ThreatModel
from fedleak.training import SGD, Adam, LocalTraining

SHAPE = (1, 8, 8)
OPTIMIZERS = [SGD(0.3), SGD(0.1, 0.9, nesterov=True, weight_decay=0.01), Adam(0.02)]


def network(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    model = LeNet(SHAPE, 3).double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def both(training, problems=2):
    """The model under test and the reference, standing at the same images."""
    targets = [Target(dict(network(seed).named_parameters()), {}, {}, training) for seed in range(problems)]
    layers = read_layers(copy.deepcopy(network()), SHAPE)
    found = LoopModel(layers, targets, device=torch.device("cpu"), dtype=torch.float64)
    reference = GeneralModel(network(), targets, device="cpu", dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    images = torch.rand(problems, 4, *SHAPE, generator=random, dtype=torch.float64)
    labels = nn.functional.one_hot(torch.randint(0, 3, (problems, 4), generator=random), 3).double()
    for model in (found, reference):
        model.at(images, labels)
    return found, reference, random


@pytest.mark.parametrize("payload", ["weights", "gradient"])
@pytest.mark.parametrize("proximal", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_products_are_those_of_automatic_differentiation(optimizer, proximal, payload):
    training = LocalTraining(payload, 2, 2, epochs=2, optimizer=optimizer, proximal=proximal)
    found, reference, random = both(training)
    directions = torch.randn(2, 4, *SHAPE, generator=random, dtype=torch.float64)
    values = {n: torch.randn(v.shape, generator=random, dtype=v.dtype) for n, v in reference.gradients().items()}
    for name, value in reference.gradients().items():
        torch.testing.assert_close(found.gradients()[name], value)
    pushed, wanted = found.push(directions), reference.push(directions)
    for name, value in wanted.items():
        torch.testing.assert_close(pushed[name], value, rtol=1e-6, atol=1e-9)
    pulled = found.pull(values)
    torch.testing.assert_close(pulled, reference.pull(values), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("optimizer", [SGD(0.3), Adam(0.02)], ids=str)
def test_the_jacobian_is_exact_and_near_for_a_large_preconditioner(optimizer, monkeypatch):
    training = LocalTraining("weights", 2, 2, optimizer=optimizer)
    found, reference, random = both(training, problems=1)
    basis = torch.randn(70, *SHAPE, generator=random, dtype=torch.float64)
    exact, wanted = found.jacobian(basis).blocks, reference.jacobian(basis).blocks
    for name, block in wanted.items():
        torch.testing.assert_close(exact[name].values, block.values, rtol=1e-6, atol=1e-9)
    targets = [Target(dict(network().named_parameters()), {}, {}, training)]
    layers = read_layers(copy.deepcopy(network()), SHAPE)
    rough = LoopModel(layers, targets, device=torch.device("cpu"), dtype=torch.float32)
    rough.at(reference.images, reference.labels)
    ones = {n: torch.ones(1) for n in wanted}
    for name, block in rough.jacobian(basis.float()).blocks.items():
        off = (block.values - wanted[name].values).norm() / wanted[name].values.norm()
        assert off < (1e-3 if isinstance(optimizer, SGD) else 0.2)  # Adam's division blows rounding up
    monkeypatch.setattr(loop, "_EXACT", 0)
    near, true = rough.jacobian(basis.float()).gram(ones), found.jacobian(basis).gram(ones)
    last = slice(140, 280)  # nothing comes after the last step, so that nothing is left out
    torch.testing.assert_close(near[:, last, last].double(), true[:, last, last], rtol=1e-3, atol=1e-6)


def test_each_client_gets_the_model_that_fits_it():
    weights = dict(network().named_parameters())
    kinds = [
        (LocalTraining("weights", 2, 1, optimizer=SGD(0.1, 0.9)), ChainModel),
        (LocalTraining("gradient", 2, 1), ChainModel),
        (LocalTraining("weights", 2, 1, optimizer=Adam(0.1)), LoopModel),
        (LocalTraining("weights", 2, 3, optimizer=SGD(0.1)), LoopModel),
    ]
    for training, kind in kinds:
        assert type(update_model(network(), [Target(weights, {}, weights, training)], SHAPE)) is kind


def client(optimizer, labels):
    """A client of wavy images, its model, and what the attacker holds."""
    training = LocalTraining("weights", 1, 3, optimizer=optimizer)
    random = torch.Generator().manual_seed(1)
    x = torch.linspace(0, 1, 8)
    waves = torch.rand(40, 3, generator=random)
    images = 0.5 + 0.2 * torch.sin(6 * waves[:, :1] * x)[:, :, None] + 0.2 * torch.cos(6 * waves[:, 1:2] * x)[:, None]
    images, model = images[:, None], network().float()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    update = local_update(model, start, {}, images[:3], labels, training).update
    known = Knowledge(model, SHAPE, 3, replace(ThreatModel(), auxiliary_data=True), (images[3:], torch.arange(37) % 3))
    return Observation(1, 0, start, update, training), known, images[:3]


@pytest.mark.parametrize("optimizer", [SGD(0.1), SGD(0.05, 0.9), pytest.param(Adam(0.01), marks=pytest.mark.slow)])
def test_map_goes_through_the_loop(optimizer):
    labels = torch.tensor([0, 1, 2])
    observation, known, images = client(optimizer, labels)
    (found,) = MAP(restarts=1).invert([observation], [LabelGuess(labels[None], torch.ones(1))], known, Run())
    assert (found.images - images).square().mean() < 1e-3


@pytest.mark.parametrize("labels", [[2, 0, 1], [1, 0, 1], [0, 1, 2]])
def test_the_order_of_the_labels_is_found_unless_they_have_one(labels):
    true = torch.tensor(labels)
    observation, known, _ = client(SGD(0.1), true)

    def ordered(given):
        guess = LabelGuess(given[None], torch.ones(1))
        (problem,) = pose([observation], [guess], known)
        return in_order(problem, 1, known, prior_of_images(known.auxiliary[0]), Run()).labels[0].tolist()

    assert ordered(true.sort().values) == labels
    assert ordered(torch.tensor([2, 1, 0])) == [2, 1, 0]
