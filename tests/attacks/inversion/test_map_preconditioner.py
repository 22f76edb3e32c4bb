"""The float32 normal matrix: another prior's coordinates are the same derivatives scaled."""

import pytest
import torch
from torch.nn.functional import one_hot

from fedleak.attacks.image_prior import natural_prior
from fedleak.attacks.inversion.map import preconditioner
from fedleak.attacks.inversion.map.preconditioner import Preconditioner
from fedleak.attacks.jacobian.features import FeatureModel
from fedleak.attacks.jacobian.models import update_model
from fedleak.attacks.problem import Target
from fedleak.models.lenet import LeNet
from fedleak.seeding import plain_generator
from fedleak.training import LocalTraining

SHAPE = (1, 8, 8)


@pytest.mark.parametrize("whole", [1000, 100])
def test_wider_coordinates_need_no_new_derivatives(whole, monkeypatch):
    monkeypatch.setattr(preconditioner, "_WHOLE", whole)
    monkeypatch.setattr(preconditioner, "_LEADING", 100)
    generator = plain_generator(0)
    start = {n: torch.rand(p.shape, generator=generator) - 0.5 for n, p in LeNet(SHAPE, 10).named_parameters()}
    target = Target(start, {}, {}, LocalTraining(batch_size=2, local_steps=1))
    model = update_model(LeNet(SHAPE, 10), [target], SHAPE, dtype=torch.float32)
    images, labels = torch.rand(1, 2, *SHAPE, generator=generator), one_hot(torch.tensor([[1, 3]]), 10).float()
    narrow, wide = natural_prior(SHAPE).tempered(1.5), natural_prior(SHAPE)
    precision = {name: torch.ones(1, dtype=torch.float64) for name in start}
    found = []
    for prior in (narrow, wide):
        one = Preconditioner(precision, prior.basis(0, 64))
        model.at(images, labels)
        one.renew(model)
        found.append(one)
    scaled, fresh = found
    assert (scaled.blocks is None) == (whole == 1000)
    ones = torch.ones(1, dtype=torch.float64)
    right = torch.randn(1, 2, 64, generator=generator, dtype=torch.float64)
    scaled.factor(1e-3 * ones, 0 * ones)
    before = scaled.solve(right)
    scaled.rescale((wide.variance / narrow.variance).sqrt(), wide.basis(0, 64))
    for one in found:
        one.factor(1e-3 * ones, 0 * ones)
    torch.testing.assert_close(scaled.solve(right), fresh.solve(right), rtol=1e-2, atol=1e-3)
    assert float((before - fresh.solve(right)).norm()) > 0.1 * float(before.norm())


def test_features_of_a_network_that_is_no_chain_have_derivatives_too():
    class Branches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fc = torch.nn.Linear(64, 20), torch.nn.Linear(20, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = self.first(x.flatten(1))
            return self.fc(a.sigmoid() + a.tanh())

    model = Branches()
    start = {n: p.detach() for n, p in model.named_parameters()}
    features = FeatureModel(model, Target(start, {}, {}, LocalTraining(batch_size=1)), "fc", logits=False)
    x, moved = torch.rand(2, 2, 1, *SHAPE, generator=plain_generator(1), dtype=torch.float64)
    features.at(x, torch.zeros(2, 1, 5))
    columns = features.jacobian(moved[:1, 0]).blocks["features"].values[:, 0, 0]
    torch.testing.assert_close(features.push(moved[:1].expand(2, -1, -1, -1, -1))["features"], columns)
