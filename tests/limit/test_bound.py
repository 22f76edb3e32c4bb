"""The limit: exact on linear models, monotone in the noise, and not beaten by chance."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedleak.attacks.image_prior import natural_prior
from fedleak.attacks.noise import Noise
from fedleak.attacks.problem import Target
from fedleak.limit import limit
from fedleak.limit.bound import _factor
from fedleak.models.lenet import LeNet
from fedleak.seeding import plain_generator
from fedleak.training import LocalTraining

SHAPE = (1, 6, 6)
TRAINING = LocalTraining(batch_size=2, local_steps=1)


def target(model: nn.Module) -> Target:
    return Target({n: p.detach() for n, p in model.named_parameters()}, {}, {}, TRAINING)


def noise(model: nn.Module, std: float) -> Noise:
    return Noise({n: torch.tensor(std, dtype=torch.float64) for n, _ in model.named_parameters()}, True)


class FirstMoments(nn.Module):
    """Softmax of a layer without weights: with logits fixed by the bias alone, its gradient is linear in the images."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(36, 4)
        nn.init.zeros_(self.fc.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.flatten(1))


def test_it_is_what_the_best_estimate_reaches_on_a_linear_model():
    # With zero weights δ does not depend on the image: ∂L/∂W = δ xᵀ is linear in it, and the estimate is known.
    model, prior, std = FirstMoments(), natural_prior(SHAPE), 0.05
    image, label = torch.full((1, *SHAPE), 0.5), torch.tensor([2])
    one = Target(target(model).parameters, {}, {}, LocalTraining(batch_size=1, local_steps=1))
    found = limit(model, one, image, label, prior, noise(model, std))
    delta = (model(image).softmax(1) - torch.nn.functional.one_hot(label, 4))[0].double()
    generator = plain_generator(0)
    z = torch.randn(4000, 36, generator=generator, dtype=torch.float64)
    x = prior.mean + z @ prior.root
    # What δ moves with x through the weights is zero, but the derivative of ∂L/∂W by x also holds δ's own, W = 0: none.
    seen = x[:, None] * delta[:, None] + std * torch.randn(4000, 4, 36, generator=generator, dtype=torch.float64)
    pooled = torch.einsum("ncd,c->nd", seen, delta) / delta.square().sum()
    gain = prior.variance / (prior.variance + std**2 / delta.square().sum())
    directions = prior.root / prior.variance.sqrt()[:, None]
    best = prior.mean + ((pooled - prior.mean) @ directions.T * gain) @ directions
    reached = (best - x).square().mean()
    torch.testing.assert_close(found.mse[0], reached, rtol=0.02, atol=0)
    bits = 0.5 * torch.log2(1 + prior.variance * delta.square().sum() / std**2).sum()
    assert abs(found.bits - float(bits)) < 1e-6 * float(bits)


def test_it_falls_with_the_noise_and_never_exceeds_the_prior():
    model, prior = LeNet((1, 12, 12), 10), natural_prior((1, 12, 12))
    images = torch.rand(2, 1, 12, 12, generator=plain_generator(1))
    labels = torch.tensor([3, 3])
    assert torch.isfinite(cross_entropy(model(images), labels))
    found = [limit(model, target(model), images, labels, prior, noise(model, std)) for std in (1e3, 1.0, 1e-2, 1e-4)]
    most = prior.variance.sum() / 144
    torch.testing.assert_close(found[0].mse, most.expand(2), rtol=1e-3, atol=0)
    for more, less in pairwise(found):
        assert (less.mse <= more.mse).all()
        assert less.bits > more.bits


def test_leading_coordinates_alone_are_never_below_all_of_them():
    model, prior = LeNet((1, 12, 12), 10), natural_prior((1, 12, 12))
    images = torch.rand(2, 1, 12, 12, generator=plain_generator(1))
    arguments = (model, target(model), images, torch.tensor([1, 2]), prior, noise(model, 1e-3))
    whole, part = limit(*arguments), limit(*arguments, unknowns=100)
    assert part.coordinates == 50
    assert (part.mse >= 0.999 * whole.mse).all()


def test_what_rounding_made_indefinite_is_factored_all_the_same() -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 40, dtype=torch.float64) * 1e8
    total = rows.mT @ rows + torch.eye(40, dtype=torch.float64)  # 1 beside 1e16: less than float64 holds
    total.diagonal().sub_(4.0)
    assert torch.linalg.cholesky_ex(total)[1] > 0
    factor = _factor(total.clone())
    torch.testing.assert_close(factor @ factor.mT, total, rtol=1e-12, atol=1e-12 * float(total.max()))
