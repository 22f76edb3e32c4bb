"""Images from the exact features of every sample: what finds all of a batch where the model is sure of most of it."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedleak.attacks.base import Knowledge, Run
from fedleak.attacks.image_prior import natural_prior
from fedleak.attacks.inversion import MAP
from fedleak.attacks.inversion.map.features import images_from_features
from fedleak.attacks.jacobian.features import FeatureModel
from fedleak.attacks.labels import Fedleak
from fedleak.attacks.problem import Target, pose
from fedleak.capture import Observation
from fedleak.models.lenet import LeNet
from fedleak.seeding import plain_generator
from fedleak.training import LocalTraining

SHAPE = (1, 12, 12)


def images_like(count: int, seed: int) -> torch.Tensor:
    drawn = torch.randn(count, 144, generator=plain_generator(seed), dtype=torch.float64)
    return natural_prior(SHAPE).images(drawn).clamp(0, 1).float()


@pytest.fixture(scope="module")
def trained() -> tuple[LeNet, torch.Tensor, torch.Tensor]:
    """A network that has learnt something about 400 images, and they with their labels."""
    generator = plain_generator(1)
    model, images = LeNet(SHAPE, 10), images_like(400, 2)
    centred = images.flatten(1) - images.flatten(1).mean(0)
    labels = (centred @ torch.randn(144, 10, generator=generator)).argmax(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        chosen = torch.randint(400, (64,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model, images, labels


@pytest.fixture(scope="module")
def victim(trained) -> tuple[Observation, torch.Tensor, torch.Tensor]:
    """An update of four images, they in the order of their labels, and their features."""
    model, images, labels = trained
    order = labels[:4].sort(stable=True).indices
    x, seen = images[:4][order], []
    hook = model.fc.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    gradients = torch.autograd.grad(cross_entropy(model(x), labels[:4][order]), list(model.parameters()))
    hook.remove()
    start = {name: parameter.detach() for name, parameter in model.named_parameters()}
    update = dict(zip(start, gradients, strict=True))
    return Observation(1, 0, start, update, LocalTraining(batch_size=4, local_steps=1)), x, seen[0]


def test_the_label_inference_hands_on_the_features_and_every_image_comes_from_its_own(trained, victim):
    observation, images, features = victim
    knowledge = Knowledge(trained[0], SHAPE, 10)
    guess = Fedleak().infer([observation], knowledge, Run())[0]
    assert guess.features.shape == features.shape
    torch.testing.assert_close(guess.features, features.double(), atol=1e-3, rtol=0)
    found = MAP(restarts=1).invert([observation], [guess], knowledge, Run())[0]
    assert found.converged
    assert float((found.images - images).square().flatten(1).mean(1).max()) < 1e-4


def test_labels_alone_are_enough_and_what_cannot_have_features_has_none(trained, victim):
    observation, images, _ = victim
    knowledge = Knowledge(trained[0], SHAPE, 10)
    guess = Fedleak().infer([observation], knowledge, Run())[0]
    (problem,) = pose([observation], [type(guess)(guess.labels, guess.confidence)], knowledge)
    prior = natural_prior(SHAPE)
    found = images_from_features(problem, observation, knowledge, prior, Run())
    assert float((found - images).square().flatten(1).mean(1).max()) < 0.05
    noisy = {n: v + 0.01 * torch.randn(v.shape, generator=plain_generator(4)) for n, v in observation.update.items()}
    worse = Observation(1, 0, observation.parameters, noisy, observation.training)
    (problem,) = pose([worse], [type(guess)(guess.labels, guess.confidence)], knowledge)
    assert images_from_features(problem, worse, knowledge, prior, Run()) is None


@pytest.mark.parametrize("logits", [False, True])
def test_derivatives_of_features_are_those_of_finite_differences(trained, logits):
    model, images, _ = trained
    start = {name: parameter.detach() for name, parameter in model.named_parameters()}
    target = Target(start, {}, start, LocalTraining(batch_size=1, local_steps=1))
    features = FeatureModel(model, target, "fc", logits=logits)
    x, moved = images[:2, None].double(), images[2:4, None].double()
    features.at(x, torch.zeros(2, 1, 10))
    push, value = features.push(moved)["features"], features.gradients()["features"]
    pull = features.pull({"features": value})
    columns = features.jacobian(moved[:1, 0]).blocks["features"].values[1, 0, 0]
    features.at(x + 1e-6 * moved, torch.zeros(2, 1, 10))
    torch.testing.assert_close((features.gradients()["features"] - value) / 1e-6, push, atol=1e-4, rtol=1e-4)
    assert float((push * value).sum()) == pytest.approx(float((pull * moved).sum()), rel=1e-9)
    features.at(x, torch.zeros(2, 1, 10))
    torch.testing.assert_close(features.push(moved[:1].expand(2, -1, -1, -1, -1))["features"][1], columns)
