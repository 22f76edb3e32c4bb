"""The prior of images: its coordinates and its calibration."""

import torch

from fedleak.attacks.image_prior import natural_prior, prior_of_images
from fedleak.seeding import plain_generator


def test_coordinates_and_images_undo_one_another():
    prior = natural_prior((3, 6, 5))
    images = torch.rand(4, 3, 6, 5, generator=plain_generator(0), dtype=torch.float64)
    torch.testing.assert_close(prior.images(prior.coordinates(images)), images)
    assert (prior.variance.diff() <= 1e-12).all()


def test_coordinates_of_new_images_have_unit_variance_even_from_few():
    generator = plain_generator(1)
    mixing = torch.randn(36, 36, generator=generator, dtype=torch.float64) / 60
    drawn = (0.5 + torch.randn(400, 36, generator=generator, dtype=torch.float64) @ mixing).view(-1, 1, 6, 6)
    prior = prior_of_images(drawn[:60])
    assert 0.7 < float(prior.coordinates(drawn[60:]).square().mean()) < 1.4
