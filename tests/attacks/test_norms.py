"""Normalisations written out: torch's values, and right second derivatives under vmap, where torch's own are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedleak.attacks.functional import functional_copy, mean_gradient

NORMS = [
    nn.BatchNorm2d(4),
    nn.BatchNorm2d(4, affine=False),
    nn.BatchNorm2d(4, track_running_stats=False),
    nn.LayerNorm([4, 5, 5]),
    nn.LayerNorm(5, elementwise_affine=False),
    nn.InstanceNorm2d(4, affine=True),
    nn.InstanceNorm2d(4, track_running_stats=True),
    nn.GroupNorm(2, 4),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("number", range(len(NORMS)))
def test_values_are_torchs_and_second_derivatives_right(number: int, training: bool) -> None:
    torch.manual_seed(number)
    head = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(100, 3))
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), NORMS[number], *head).double().train(training)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5) if "var" in name else nn.init.uniform_(value, -0.5, 0.5)
    copy, buffers = functional_copy(model, training), dict(functional_copy(model, training).named_buffers())
    images, labels = torch.rand(2, 3, 2, 5, 5).double(), torch.randn(2, 3, 3).double().softmax(2)
    torch.testing.assert_close(copy(images[0]), model(images[0]), rtol=1e-10, atol=1e-12)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    assert set(weights) == {name for name, _ in copy.named_parameters()}
    wanted = {name: torch.randn_like(value) for name, value in weights.items()}

    def gap(images: torch.Tensor) -> torch.Tensor:
        def one(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            update = mean_gradient(copy, weights, buffers, x, y)
            return torch.stack([(update[name] - wanted[name]).square().sum() for name in wanted]).sum()

        return torch.vmap(one)(images, labels).sum()

    leaf, along = images.clone().requires_grad_(), torch.randn_like(images)
    (slope,) = torch.autograd.grad(gap(leaf), leaf)
    numeric = (gap(images + 1e-5 * along) - gap(images - 1e-5 * along)) / 2e-5
    torch.testing.assert_close((slope * along).sum(), numeric, rtol=1e-6, atol=1e-8)
