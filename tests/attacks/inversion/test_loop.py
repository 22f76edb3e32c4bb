"""Distances problem by problem: what vectorised differentiation gives, for networks that branch and normalise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedleak.attacks.inversion import L2, Cosine, RelativeL2
from fedleak.attacks.inversion.distances import Comparison, GeneralDistance, LoopDistance, loop
from fedleak.attacks.inversion.objectives import Elementwise
from fedleak.attacks.problem import Problem, Target
from fedleak.training import LocalTraining

SHAPE, CLASSES = (3, 8, 8), 5


class Residual(nn.Module):
    """Strides, a 1×1 shortcut, a bias, a layer used twice, normalisation, and a wide fully connected layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Tanh())
        self.long = nn.Sequential(nn.Conv2d(6, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True))
        self.short = nn.Conv2d(6, 24, 1, 4)
        self.twice = nn.Conv2d(24, 24, 3, padding=1)
        self.halve = nn.Conv2d(24, 24, 3, 2, 1)
        self.head = nn.Sequential(nn.Linear(96, 40), nn.Sigmoid(), nn.Linear(40, CLASSES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.stem(images)
        maps = self.halve(self.long(maps)) + self.short(maps)
        return self.head(self.twice(torch.tanh(self.twice(maps))).flatten(1))


def problems_of(model: nn.Module, count: int, batch: int, *, own: bool, train: bool) -> list[Problem]:
    problems = []
    for _ in range(count):
        if own or not problems:
            for parameter in model.parameters():
                nn.init.uniform_(parameter, -0.2, 0.2)
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point():
                    buffer.uniform_(0.5, 1.5) if "var" in name else buffer.normal_()
        named = dict(model.named_parameters())
        loss = nn.functional.cross_entropy(model(torch.rand(batch, *SHAPE).double()), torch.randint(CLASSES, (batch,)))
        update = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        weights = {name: value.detach().clone() for name, value in named.items()}
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        training = LocalTraining(batch_size=batch, local_steps=1, training_mode=train)
        problems.append(Problem(0, (1, 0, 0), (Target(weights, buffers, update, training),), batch))
    return problems


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(loop, "_FILLING", 0)


@pytest.mark.parametrize("objective", [L2(), Cosine(), RelativeL2()])
@pytest.mark.parametrize(("batch", "own", "train"), [(1, True, False), (2, False, False), (2, True, True)])
def test_it_is_what_vectorised_differentiation_gives(always, objective, batch: int, own: bool, train: bool) -> None:
    torch.manual_seed(batch)
    model = Residual().double().train(train)
    problems = problems_of(model, 2, batch, own=own, train=train)
    images = torch.rand(2, batch, *SHAPE, dtype=torch.float64)
    labels = torch.randn(2, batch, CLASSES, dtype=torch.float64).softmax(2)
    comparison = Comparison(model, objective, SHAPE, dtype=torch.float64)
    found = []
    for kind in (LoopDistance, GeneralDistance):
        distance = kind.fit(comparison, problems)
        assert distance is not None
        found.append(distance.evaluate(distance.load(problems), images, labels, with_labels=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_the_angle_forms_no_gradient_of_a_layer_with_few_places(always) -> None:
    model = Residual().eval()
    problems = problems_of(model.double(), 1, 1, own=True, train=False)
    wanted = {"twice.weight", "halve.weight", "head.0.weight", "head.2.weight"}
    for objective, dtype, products in (
        (Cosine(), torch.float32, wanted),
        (L2(), torch.float64, wanted),
        (L2(), torch.float32, set()),
    ):
        distance = LoopDistance.fit(Comparison(model, objective, SHAPE, dtype=dtype), problems)
        assert distance is not None
        seen: set[str] = set()
        distance.model.register_forward_hook(lambda *_, d=distance, s=seen: s.update(d.seen))
        rows = distance.load(problems)
        distance.evaluate(rows, torch.rand(1, 1, *SHAPE, dtype=dtype), torch.full((1, 1, CLASSES), 0.2, dtype=dtype))
        assert seen == products


def test_it_is_not_for_small_networks_or_other_comparisons(monkeypatch) -> None:
    model = Residual().double().eval()
    problems = problems_of(model, 1, 1, own=True, train=False)
    comparison = Comparison(model, Cosine(), SHAPE, dtype=torch.float64)
    assert LoopDistance.fit(comparison, problems) is None  # too small to fill a processor
    monkeypatch.setattr(loop, "_FILLING", 0)
    assert LoopDistance.fit(comparison, problems) is not None
    assert LoopDistance.fit(replace(comparison, unrolled=True), problems) is None

    class Absolute(Elementwise):
        def elementwise(self, gap, target):
            raise NotImplementedError

    assert LoopDistance.fit(replace(comparison, objective=Absolute()), problems) is None
    targets = (replace(problems[0].targets[0], imitate=lambda update: update),)
    assert LoopDistance.fit(comparison, [replace(problems[0], targets=targets)]) is None
