"""Derivatives of updates by images: against finite differences, and the products against one another."""

import torch
from torch.nn.functional import one_hot

from fedleak.attacks.chain import read_layers
from fedleak.attacks.jacobian.chain import ChainModel
from fedleak.attacks.problem import Target
from fedleak.models.lenet import LeNet
from fedleak.seeding import plain_generator
from fedleak.training import LocalTraining

SHAPE = (1, 12, 12)


def models(count: int = 2, batch: int = 2) -> tuple[ChainModel, torch.Tensor, torch.Tensor]:
    generator = plain_generator(0)
    problems, network = [], LeNet(SHAPE, 10)
    for _ in range(count):
        weights = {n: torch.rand(p.shape, generator=generator) - 0.5 for n, p in network.named_parameters()}
        problems.append(Target(weights, {}, {}, LocalTraining()))
    layers = read_layers(network, SHAPE)
    assert layers is not None
    images = torch.rand(count, batch, *SHAPE, generator=generator, dtype=torch.float64)
    labels = one_hot(torch.randint(10, (count, batch), generator=generator), 10).double()
    return ChainModel(layers, problems, device=torch.device("cpu"), dtype=torch.float64), images, labels


def test_derivatives_are_those_of_finite_differences():
    model, images, labels = models()
    directions = torch.randn(images.shape, generator=plain_generator(1), dtype=torch.float64)
    model.at(images, labels)
    pushed = model.push(directions)
    ends = []
    for step in (1e-5, -1e-5):
        model.at(images + step * directions, labels)
        ends.append(model.gradients())
    for name, value in pushed.items():
        torch.testing.assert_close((ends[0][name] - ends[1][name]) / 2e-5, value, rtol=1e-6, atol=1e-9)


def test_columns_push_pull_and_gram_agree():
    model, images, labels = models()
    generator = plain_generator(2)
    basis = torch.randn(5, *SHAPE, generator=generator, dtype=torch.float64)
    z = torch.randn(2, 10, generator=generator, dtype=torch.float64)
    model.at(images, labels)
    jacobian = model.jacobian(basis)
    model.at(images, labels)
    by_columns = jacobian.push(z)
    by_sweeps = model.push(torch.einsum("pbk,kchw->pbchw", z.view(2, 2, 5), basis))
    for name, value in by_columns.items():
        torch.testing.assert_close(by_sweeps[name], value, rtol=1e-9, atol=1e-12)
    values = {n: torch.randn(v.shape, generator=generator, dtype=torch.float64) for n, v in by_columns.items()}
    pulled = torch.einsum("pbchw,kchw->pbk", model.pull(values), basis).flatten(1)
    torch.testing.assert_close(pulled, jacobian.pull(values), rtol=1e-9, atol=1e-12)
    each = {n: torch.rand(2, generator=generator, dtype=torch.float64) for n in values}
    spread = {n: each[n][:, None].expand_as(values[n]) for n in values}
    torch.testing.assert_close(jacobian.gram(each), jacobian.gram(spread), rtol=1e-9, atol=1e-12)
    weighed = {n: each[n][:, None] * by_columns[n] for n in values}
    product = (jacobian.gram(each) @ z[..., None])[..., 0]
    torch.testing.assert_close(product, jacobian.pull(weighed), rtol=1e-9, atol=1e-12)
