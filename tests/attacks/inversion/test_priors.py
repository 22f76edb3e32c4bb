"""Priors: known values, one per problem, gradients everywhere."""

from __future__ import annotations

import pytest
import torch

from fedleak.attacks.inversion import ImageNorm, Prior, SmoothTotalVariation, TotalVariation


def test_total_variation_of_a_step() -> None:
    images = torch.zeros(2, 1, 1, 4, 4)
    images[1, ..., 2:] = 0.6  # one vertical edge: 4 of the 12 horizontal pairs differ
    torch.testing.assert_close(TotalVariation(weight=2.0)(images), torch.tensor([0.0, 2 * 0.6 / 3]))


def test_smooth_total_variation_couples_colours() -> None:
    grey, coloured = torch.zeros(1, 1, 3, 4, 4), torch.zeros(1, 1, 3, 4, 4)
    grey[..., 2:] = 0.5
    for channel in range(3):
        coloured[:, :, channel, :, channel + 1 :] = 0.5  # the edges of the colours lie apart
    prior = SmoothTotalVariation(weight=1.0, epsilon=1e-4)
    torch.testing.assert_close(prior(grey), torch.tensor([3**0.5 * 0.5 / 3]), rtol=1e-3, atol=0)
    torch.testing.assert_close(prior(coloured), torch.tensor([0.5]), rtol=1e-3, atol=0)
    torch.testing.assert_close(TotalVariation(weight=1.0)(grey), TotalVariation(weight=1.0)(coloured))


def test_image_norm_is_the_distance_from_grey() -> None:
    torch.testing.assert_close(ImageNorm(weight=3.0)(torch.full((2, 1, 1, 2, 2), 0.9)), torch.full((2,), 3 * 0.16))


@pytest.mark.parametrize("prior", [TotalVariation(weight=1.0), SmoothTotalVariation(weight=1.0), ImageNorm(weight=1.0)])
def test_one_penalty_per_problem_and_finite_gradients(prior: Prior) -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 2, 3, 6, 5)
    images[0] = 0.5  # flat
    together = prior(images)
    alone = torch.cat([prior(image[None]) for image in images])
    torch.testing.assert_close(together, alone)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(prior(leaf).sum(), leaf)
    assert gradient.isfinite().all()
    assert (gradient[1:] != 0).any()
