"""The three hooks of a defense: per example, before sending, and imitated by an attacker who knows it."""

import math

import pytest
import torch
from torch.func import grad

from fedleak.defenses import Chain, Defense, Gaussian, Imitation, Laplacian, NoDefense, Pruning
from fedleak.defenses.base import leaving
from fedleak.errors import UsageError
from fedleak.training import LocalTraining

TRAINING = LocalTraining(local_steps=1)
UPDATE = {"w": torch.tensor([[3.0, -0.5, 2.0, 0.25]]), "b": torch.tensor([1.0, -4.0])}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Clip(Defense):
    """Every sample's gradient, all tensors together, to a norm of at most one."""

    def examples(self, gradients, *, generator):
        norms = sum(value.flatten(1).square().sum(1) for value in gradients.values()).sqrt().clamp(min=1.0)
        return {name: value / norms.view(-1, *[1] * (value.dim() - 1)) for name, value in gradients.items()}


class Double(Defense):
    def apply(self, update, *, generator):
        return {name: 2 * value for name, value in update.items()}

    def imitate(self, observed, training):
        return Imitation(lambda update: {n: 2 * v for n, v in update.items()}, dict.fromkeys(observed, 0.0))


class Secret(Defense):
    def imitate(self, observed, training):
        return None


def test_only_what_looks_at_examples_costs_a_gradient_each():
    assert not any(defense.per_example for defense in (NoDefense(), Gaussian(0.1), Chain([Pruning(0.5), Double()])))
    chain = Chain([Double(), Clip(), Gaussian(0.0)])
    assert Clip().per_example
    assert chain.per_example
    gradients = {"w": torch.tensor([[3.0, 4.0], [0.1, 0.2]])}
    clipped = chain.examples(gradients, generator=generator())
    torch.testing.assert_close(clipped["w"], torch.tensor([[0.6, 0.8], [0.1, 0.2]]))
    assert NoDefense().examples(gradients, generator=generator())["w"] is gradients["w"]


@pytest.mark.parametrize("defense", [NoDefense(), Gaussian(0.1), Laplacian(0.1), Clip()])
def test_what_has_mean_zero_is_imitated_by_nothing(defense):
    found = defense.imitate(UPDATE, TRAINING)
    assert all(found.function(UPDATE)[name] is value for name, value in UPDATE.items())
    std = {Gaussian: 0.1, Laplacian: 0.1 * math.sqrt(2)}.get(type(defense), 0.0)
    assert found.noise == {"w": pytest.approx(std), "b": pytest.approx(std)}


def test_pruning_is_imitated_by_the_mask_that_its_zeros_show():
    pruning = Pruning(0.5)
    sent = pruning.apply(UPDATE, generator=generator())
    found = pruning.imitate(sent, TRAINING)
    made = found.function({"w": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "b": torch.tensor([5.0, 6.0])})
    assert made["w"].tolist() == [[1, 0, 3, 0]]
    assert made["b"].tolist() == [0, 6]
    assert all(torch.equal(value, sent[name]) for name, value in found.function(UPDATE).items())
    assert found.noise["w"].flatten().tolist() == pytest.approx([0, 2 / 3**0.5, 0, 2 / 3**0.5])
    assert all((UPDATE[n][sent[n] == 0].abs() <= 3**0.5 * std[sent[n] == 0]).all() for n, std in found.noise.items())
    through = grad(lambda w: found.function({**UPDATE, "w": w})["w"].sum())(UPDATE["w"])
    assert through.tolist() == [[1, 0, 1, 0]]


def test_a_chain_is_imitated_part_by_part():
    chain = Chain([Gaussian(0.3), Double(), Laplacian(0.5), Pruning(0.5)])
    sent = {"w": torch.tensor([[6.0, 0, 4.0, 0]]), "b": torch.tensor([0.0, -8.0])}
    found = chain.imitate(sent, TRAINING)
    assert found.function(UPDATE)["w"].tolist() == [[6, 0, 4, 0]]
    assert found.noise["w"][sent["w"] != 0].tolist() == pytest.approx([math.hypot(2 * 0.3, 0.5 * 2**0.5)] * 2)
    assert found.noise["w"][sent["w"] == 0].tolist() == pytest.approx([4 / 3**0.5] * 2)
    assert Chain([Gaussian(0.1), Secret()]).imitate(sent, TRAINING) is None


def test_a_chains_noise_is_the_noise_there_is():
    chain, count = Chain([Gaussian(0.2), Double(), Gaussian(0.3)]), 20_000
    zero = {"w": torch.zeros(count)}
    found = chain.imitate(zero, TRAINING)
    std = chain.apply(zero, generator=generator())["w"].std()
    assert float(std) == pytest.approx(float(found.noise["w"][0]), rel=5 / math.sqrt(2 * count))


class InPlace(Defense):
    def apply(self, update, *, generator):
        for value in update.values():
            value.zero_()
        return update


class Leaves(Defense):
    def apply(self, update, *, generator):
        return {name: value for name, value in update.items() if name != "b"}


class Adds(Defense):
    def apply(self, update, *, generator):
        return {**update, "x": torch.zeros(1)}


class Widens(Defense):
    def apply(self, update, *, generator):
        return {name: value.double() for name, value in update.items()}


def test_what_the_defense_returns_is_what_leaves():
    given = {name: value.clone() for name, value in UPDATE.items()}
    gone = leaving(InPlace(), given, generator=generator())
    assert all(not value.any() for value in gone.values())
    assert all(torch.equal(given[name], value) for name, value in UPDATE.items()), "the given ones stay"
    for defense, fault in (
        (Leaves(), r"defense=Leaves left out b, and the update is withheld"),
        (Adds(), r"defense=Adds made up x, and the update is withheld"),
        (Widens(), r"defense=Widens made torch\.float64 of w, which is torch\.float32"),
    ):
        with pytest.raises(UsageError, match=fault):
            leaving(defense, given, generator=generator())
