"""The coordinates of images: an exact change of coordinates with its adjoint."""

from __future__ import annotations

import pytest
import torch
from scipy.fft import dctn

from fedleak.attacks.inversion.coordinates import Coordinates, Cosines


def on(shape: tuple[int, int, int], smoothness: float) -> Coordinates:
    made = Cosines(smoothness) if smoothness else Coordinates()
    return made.on(shape, device=torch.device("cpu"), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 8, 6)])
@pytest.mark.parametrize("smoothness", [0.0, 0.5, 1.5])
def test_there_and_back_and_the_adjoint(shape: tuple[int, int, int], smoothness: float) -> None:
    torch.manual_seed(0)
    basis = on(shape, smoothness)
    images, other = torch.rand(2, 4, *shape, dtype=torch.float64), torch.randn(2, 4, *shape, dtype=torch.float64)
    torch.testing.assert_close(basis.images(basis.unknowns(images)), images)
    unknowns = basis.unknowns(images).requires_grad_()
    (gradient,) = torch.autograd.grad((basis.images(unknowns) * other).sum(), unknowns)
    torch.testing.assert_close(basis.pull(other), gradient)


def test_unknowns_are_weighted_cosine_amplitudes() -> None:
    image = torch.rand(3, 8, 6, dtype=torch.float64)
    unknowns = on((3, 8, 6), 1.0).unknowns(image)
    amplitudes = torch.from_numpy(dctn(image.numpy() - 0.5, norm="ortho"))
    torch.testing.assert_close(unknowns[0, 0, 0], amplitudes[0, 0, 0])
    torch.testing.assert_close(unknowns[2, 4, 4], amplitudes[2, 4, 4] * 7)  # 1 + √(2² + 4² + 4²)


def test_by_default_they_are_the_pixels() -> None:
    image = torch.rand(1, 4, 4)
    basis = Coordinates()
    assert basis.images(image) is image
    assert basis.pull(image) is image
