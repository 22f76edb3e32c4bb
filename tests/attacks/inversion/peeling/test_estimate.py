import pytest
import torch
from torch import nn

from fedleak.attacks.inversion.peeling.chain import Chain
from fedleak.attacks.inversion.peeling.estimate import (
    Estimate,
    apply,
    apply_transposed,
    estimate_input,
    gradient_system,
)


def conv(channels, outputs, stride):
    """A convolution on 5×6 images, as a layer, and its random weights ``[2, O, C, K]``."""
    model = nn.Sequential(nn.Conv2d(channels, outputs, 3, stride=stride, padding=1), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, channels, 5, 6))
    layer = Chain.read(model, (channels, 5, 6)).layers[0]
    generator = torch.Generator().manual_seed(channels + 10 * outputs)
    return layer, torch.randn(2, outputs, channels, 9, generator=generator, dtype=torch.float64), generator


def dense(layer, kernel, delta):
    """The matrices of the outputs and of the weight gradient, ``[N, equations, C·H·W]``."""
    channels, pixels = layer.shape[0], layer.pixels
    basis = torch.eye(channels * pixels, dtype=torch.float64).view(-1, 1, channels, pixels)
    forward = torch.stack([apply(layer, kernel, b.expand(len(kernel), -1, -1)).flatten(1) for b in basis], -1)
    gradient = torch.stack(
        [layer.weight_gradient(b.expand(len(kernel), -1, -1)[:, None], delta[:, None]).flatten(1) for b in basis], -1
    )
    return forward, gradient


@pytest.mark.parametrize(
    ("channels", "outputs", "stride"), [(2, 5, 1), (4, 2, 2), (3, 3, 1)], ids=["primal", "dual", "square"]
)
def test_it_is_the_weighted_least_squares_solution(channels, outputs, stride):
    layer, kernel, generator = conv(channels, outputs, stride)
    positions = layer.taps.shape[1]

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    delta, truth = normal(2, outputs, positions), normal(2, channels, 30)
    std = normal(2, outputs, positions).abs() + 0.01
    gradient_std, prior = (
        torch.tensor([0.1, 0.02]).double(),
        Estimate(normal(1, channels, 1), torch.full((1, 1, 1), 0.7)),
    )
    prior = Estimate(prior.mean, prior.std.double())
    forward, backward = dense(layer, kernel, delta)
    z = apply(layer, kernel, truth) + std * normal(2, outputs, positions)
    g = (backward @ truth.flatten(1)[..., None])[..., 0]
    g = (g + gradient_std[:, None] * normal(*g.shape)).view(2, outputs, channels, 9)
    found = estimate_input(layer, kernel, g, gradient_std, delta, Estimate(z, std), prior)
    for n in range(2):
        rows = torch.cat(
            [forward[n] / std[n].flatten()[:, None], backward[n] / gradient_std[n], torch.eye(channels * 30) / 0.7]
        )
        mean = prior.mean.expand(1, channels, 30).flatten()
        right = torch.cat([z[n].flatten() / std[n].flatten(), g[n].flatten() / gradient_std[n], mean / 0.7])
        wanted = torch.linalg.lstsq(rows, right).solution
        torch.testing.assert_close(found.mean[n].flatten(), wanted, rtol=1e-6, atol=1e-8)
        claimed, actual = found.std[n].square().mean(), torch.linalg.inv(rows.T @ rows).diagonal().mean()
        assert 0.2 < claimed / actual < 5


def test_without_outputs_the_weight_gradient_alone_decides():
    layer, kernel, generator = conv(2, 6, 1)
    delta = torch.randn(2, 6, 30, generator=generator, dtype=torch.float64)
    truth = torch.rand(2, 2, 30, generator=generator, dtype=torch.float64)
    gradient = layer.weight_gradient(truth[:, None], delta[:, None])
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    found = estimate_input(
        layer, kernel, gradient, torch.full((2,), 1e-6).double(), delta, None, Estimate(0.5 * one, one)
    )
    torch.testing.assert_close(found.mean, truth, rtol=0, atol=1e-3)
    assert found.std.max() < 1e-2


def test_the_gradient_system_and_the_adjoint():
    layer, kernel, generator = conv(3, 4, 2)
    delta = torch.randn(2, 4, layer.taps.shape[1], generator=generator, dtype=torch.float64)
    inputs = torch.randn(2, 3, 30, generator=generator, dtype=torch.float64)
    by_matrix = (gradient_system(layer, delta) @ inputs.mT).unflatten(1, (4, 9)).permute(0, 1, 3, 2)
    torch.testing.assert_close(by_matrix, layer.weight_gradient(inputs[:, None], delta[:, None]))
    left = (apply(layer, kernel, inputs) * delta).sum()
    torch.testing.assert_close(left, (inputs * apply_transposed(layer, kernel, delta)).sum())


def test_a_batch_is_one_tall_image():
    layer, kernel, generator = conv(2, 3, 2)
    images = torch.randn(2, 4, 2, 30, generator=generator, dtype=torch.float64)
    tall = layer.tall(4)
    together = apply(tall, kernel, images.transpose(1, 2).flatten(2)).unflatten(2, (4, -1)).transpose(1, 2)
    for sample in range(4):
        torch.testing.assert_close(together[:, sample], apply(layer, kernel, images[:, sample]))
