"""Derivatives of updates by images: against finite differences, and the products against one another."""

from dataclasses import replace

import torch
from torch.nn.functional import one_hot

from fedleak.attacks.chain import read_layers
from fedleak.attacks.jacobian.chain import ChainModel
from fedleak.attacks.jacobian.general import GeneralModel
from fedleak.attacks.problem import Target
from fedleak.models.lenet import LeNet
from fedleak.seeding import plain_generator
from fedleak.training import SGD, LocalTraining

SHAPE = (1, 12, 12)


def targets(count: int) -> list[Target]:
    generator = plain_generator(0)
    training = LocalTraining(batch_size=2, local_steps=1)
    shapes = {name: parameter.shape for name, parameter in LeNet(SHAPE, 10).named_parameters()}
    return [
        Target({n: torch.rand(shape, generator=generator) - 0.5 for n, shape in shapes.items()}, {}, {}, training)
        for _ in range(count)
    ]


TARGETS = targets(2)


def models() -> tuple[ChainModel, torch.Tensor, torch.Tensor]:
    layers = read_layers(LeNet(SHAPE, 10), SHAPE)
    assert layers is not None
    generator = plain_generator(5)
    images = torch.rand(2, 2, *SHAPE, generator=generator, dtype=torch.float64)
    labels = one_hot(torch.randint(10, (2, 2), generator=generator), 10).double()
    return ChainModel(layers, TARGETS, device=torch.device("cpu"), dtype=torch.float64), images, labels


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


def test_sweeps_agree_with_automatic_differentiation():
    chain, images, labels = models()
    general = GeneralModel(LeNet(SHAPE, 10), TARGETS, device="cpu", dtype=torch.float64)
    generator = plain_generator(3)
    directions = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    basis = torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64)
    found = []
    for model in (chain, general):
        model.at(images, labels)
        pushed = model.push(directions)
        columns = model.jacobian(basis).push(torch.ones(2, 6, dtype=torch.float64))
        model.at(images, labels)
        gradients = model.gradients()
        found.append((gradients, pushed, columns, {"images": model.pull(gradients)}))
    for mine, theirs in zip(*found, strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-12)


def test_derivatives_go_through_several_local_steps():
    training = LocalTraining("weights", batch_size=2, local_steps=2, epochs=2, optimizer=SGD(0.1, momentum=0.9))
    target = replace(TARGETS[0], training=training)
    model = GeneralModel(LeNet(SHAPE, 10), [target], device="cpu", dtype=torch.float64)
    generator = plain_generator(4)
    images = torch.rand(1, 4, *SHAPE, generator=generator, dtype=torch.float64)
    directions = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    labels = one_hot(torch.tensor([[1, 2, 3, 3]]), 10).double()
    model.at(images, labels)
    pushed = model.push(directions)
    ends = []
    for step in (1e-5, -1e-5):
        model.at(images + step * directions, labels)
        ends.append(model.gradients())
    for name, value in pushed.items():
        torch.testing.assert_close((ends[0][name] - ends[1][name]) / 2e-5, value, rtol=1e-5, atol=1e-9)
