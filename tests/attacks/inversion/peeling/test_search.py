import pytest
import torch
from torch import nn

from fedleak.attacks.inversion.peeling.chain import Chain
from fedleak.attacks.inversion.peeling.estimate import Estimate
from fedleak.attacks.inversion.peeling.search import _Problem, roughness, search


def known(batch, shape=(3, 12, 12), count=2):
    """What `search` is given of `count` batches: everything about the second convolution is known."""
    model = nn.Sequential(
        nn.Conv2d(shape[0], 6, 3, stride=2, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(6, 6, 3, stride=2, padding=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.LazyLinear(20),
    )
    model(torch.zeros(1, *shape))
    chain = Chain.read(model, shape)
    generator = torch.Generator().manual_seed(batch)
    parameters = {
        n: (torch.rand(count, *p.shape, generator=generator, dtype=torch.float64) - 0.5) * 2
        for n, p in model.named_parameters()
    }
    coarse = torch.rand(count * batch, shape[0], 3, 3, generator=generator, dtype=torch.float64)
    images = nn.functional.interpolate(coarse, shape[1:], mode="bilinear").view(count, batch, *shape)
    labels = torch.arange(batch).expand(count, -1)
    gradients = chain.gradients(images, labels, parameters)
    values = chain.forward(images, parameters)
    logits = values[-1].flatten(2)
    delta = (logits.softmax(-1) - nn.functional.one_hot(labels, 20))[..., None] / batch
    delta = chain.layers[4].backward(delta, parameters).reshape(values[4].reshape(values[3].shape).shape)
    delta = delta * chain.layers[3].slope(values[4].reshape(values[3].shape))
    outputs = values[3] - parameters[chain.layers[2].bias][:, None, :, None]
    noise = {name: torch.full((count,), 1e-8, dtype=torch.float64) for name in parameters}
    return chain, parameters, gradients, noise, Estimate(outputs, torch.full_like(outputs, 1e-6)), delta, images


def test_it_finds_smooth_images_that_equations_alone_leave_open():
    *given, images = known(3)
    chain, parameters, gradients, noise, outputs, delta = given
    assert outputs.mean[0].numel() + sum(gradients[f"{n}.weight"][0].numel() for n in (0, 2)) < images[0].numel()
    found = search(chain, 2, parameters, gradients, noise, outputs, delta)
    assert found.shape == images.shape
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert (found - images).square().mean() < 1e-3
    grey = (torch.full_like(images, 0.5) - images).square().mean()
    assert (found - images).square().mean() < grey / 30


def test_the_gradient_is_that_of_the_objective():
    chain, parameters, gradients, noise, outputs, delta, images = known(2)
    problem = _Problem(chain, 2, parameters, gradients, noise, outputs, delta)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(images.flatten(1).shape, generator=generator)
    problem.whiten_below(x)
    along = torch.randn(x.shape, generator=generator)
    _, gradient = problem.evaluate(x, 0.1)
    up, down = (problem.evaluate(x + sign * 1e-3 * along, 0.1)[0] for sign in (1, -1))
    torch.testing.assert_close((up - down) / 2e-3, (gradient * along).sum(1), rtol=2e-2, atol=1e-2)


def test_the_truth_has_no_misfit():
    chain, parameters, gradients, noise, outputs, delta, images = known(2)
    problem = _Problem(chain, 2, parameters, gradients, noise, outputs, delta)
    truth = images.flatten(1).float()
    problem.whiten_below(truth)
    value, _ = problem.evaluate(truth, 1e-3)
    other, _ = problem.evaluate(torch.full_like(truth, 0.5), 1e-3)
    torch.testing.assert_close(value, roughness(images.float()), rtol=1e-3, atol=1e-3)
    assert (other > 2 * value).all()


def test_batched_equals_one_at_a_time():
    chain, parameters, gradients, noise, outputs, delta, _ = known(2)
    together = search(chain, 2, parameters, gradients, noise, outputs, delta)
    for n in range(2):
        own = slice(n, n + 1)
        parts = [{name: value[own] for name, value in group.items()} for group in (parameters, gradients, noise)]
        alone = search(chain, 2, *parts, Estimate(outputs.mean[own], outputs.std[own]), delta[own])
        assert (alone[0] - together[n]).square().mean() < 1e-4


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_roughness(channels):
    flat = torch.full((2, 1, channels, 6, 7), 0.3)
    assert roughness(flat).abs().max() < 1e-6
    rough = torch.rand(2, 1, channels, 6, 7, generator=torch.Generator().manual_seed(0))
    smooth = rough.cumsum(-1).cumsum(-2) / 42
    assert (roughness(rough) > roughness(smooth)).all()
    assert torch.equal(roughness(rough)[1:], roughness(rough[1:]))
