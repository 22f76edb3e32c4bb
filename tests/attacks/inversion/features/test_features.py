"""Fully connected layers unwound, a batch split by its zeros, and the search through the convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedleak.attacks import Knowledge, LabelGuess
from fedleak.attacks.base import Run
from fedleak.attacks.chain import read_layers
from fedleak.attacks.inversion import Chooser, FeaturesFirst, GradientMatching, Peeling
from fedleak.attacks.inversion.features.body import Body
from fedleak.attacks.inversion.features.sparse import split
from fedleak.attacks.inversion.features.undo import undo_convolution
from fedleak.attacks.inversion.features.unwind import separate_batch, split_batch, unwind
from fedleak.capture import Observation
from fedleak.errors import UsageError
from fedleak.local_update import local_update
from fedleak.models import CNN, MLP, LeNet
from fedleak.training import LocalTraining

SHAPE = (1, 16, 16)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """Bright discs on black: images with few edges."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    centres = 4 + 8 * torch.rand(count, 2, generator=random)
    far = ((rows - centres[:, 0, None, None]) ** 2 + (columns - centres[:, 1, None, None]) ** 2).sqrt()
    return (4 - far).clamp(0, 1)[:, None]


def observed(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Observation:
    start = {n: p.detach() for n, p in model.named_parameters()}
    training = LocalTraining(batch_size=len(images), local_steps=1)
    return Observation(1, 0, start, local_update(model, start, {}, images, labels, training).update, training)


def small_cnn(seed: int = 0, **settings: object) -> CNN:
    torch.manual_seed(seed)
    return CNN(SHAPE, 10, **({"hidden": (60, 40), "channels": (4, 8)} | settings))


@pytest.mark.parametrize("settings", [{}, {"activation": "sigmoid"}, {"pool": "average", "activation": "leaky_relu"}])
def test_one_sample_unwinds_to_its_features_and_their_derivative(settings):
    model = small_cnn(**settings).double()
    images, labels = pictures(1).double(), torch.tensor([3])
    features = model.body(images).detach().requires_grad_()
    loss = nn.functional.cross_entropy(model.fc(model.head(features)), labels)
    (by_features,) = torch.autograd.grad(loss, features)
    found = unwind(read_layers(model, SHAPE), observed(model, images, labels))
    assert torch.allclose(found.features, features, atol=1e-8)
    assert torch.allclose(found.by_features, by_features, atol=1e-8)
    assert found.error < 1e-8


def test_a_batch_unwinds_from_the_inputs_of_its_last_layer():
    model = small_cnn().double()
    images, labels = pictures(3).double(), torch.tensor([3, 1, 7])
    found = unwind(
        read_layers(model, SHAPE), observed(model, images, labels), labels, model.head(model.body(images)).detach()
    )
    assert torch.allclose(found.features, model.body(images), atol=1e-6)
    assert found.error < 1e-6


def test_what_cannot_unwind_is_none():
    model = small_cnn()
    observation = observed(model, pictures(1), torch.tensor([3]))
    observation.update["head.0.bias"].zero_()
    assert unwind(read_layers(model, SHAPE), observation) is None
    convolutions = nn.Sequential(nn.Conv2d(1, 10, 16), nn.Flatten())
    assert unwind(read_layers(convolutions, SHAPE), observation) is None


@pytest.mark.parametrize("double", [False, True])
def test_a_batch_is_split_into_its_samples_by_its_zeros(double):
    torch.manual_seed(1)
    model = MLP(SHAPE, 10, hidden=(120, 84), activation="relu")
    model = model.double() if double else model
    images = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0)).to(model.fc.weight)
    labels = torch.tensor([4, 4, 1, 0, 9, 2])
    observation = observed(model, images, labels)
    found = split_batch(read_layers(model, SHAPE), observation, 6)
    assert found.labels.tolist() == [0, 1, 2, 4, 4, 9]
    wanted = images.flatten(1).double()
    gap = torch.cdist(wanted, found.features).min(1).values / wanted.norm(dim=1)
    assert gap.max() < (1e-9 if double else 1e-4)


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "leaky_relu"])
@pytest.mark.parametrize("known", [True, False])
def test_a_batch_separates_by_the_spaces_of_its_hidden_layers(activation, known):
    model = small_cnn(activation=activation, channels=(4, 6))
    images, labels = pictures(5, seed=4), torch.tensor([4, 4, 1, 0, 4])
    images = images + 0.3 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    model = model.double()
    observation = observed(model, images.double(), labels)
    found = separate_batch(read_layers(model, SHAPE), observation, 5, labels if known else None)
    assert found.labels.tolist() == [0, 1, 4, 4, 4]
    features = model.body(images.double()).detach().requires_grad_()
    loss = nn.functional.cross_entropy(model.fc(model.head(features)), labels)
    (by_features,) = torch.autograd.grad(loss, features)
    far, nearest = torch.cdist(features.detach(), found.features).min(1)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3, 4]
    assert (far / features.norm(dim=1)).max() < 1e-3
    assert torch.allclose(found.by_features[nearest], by_features, atol=1e-3 * by_features.abs().max())


def test_a_wrong_guess_of_labels_does_not_keep_a_batch_together():
    torch.manual_seed(0)
    model = MLP(SHAPE, 10, hidden=(80, 60), activation="relu")
    images, labels = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([4, 4, 1, 0])
    wrong = LabelGuess(torch.tensor([[1, 4, 4, 5]]), torch.ones(1))
    (found,) = Chooser().invert([observed(model, images, labels)], [wrong], Knowledge(model, SHAPE, 10), Run())
    assert (found.labels.tolist(), found.converged) == ([0, 1, 4, 4], True)
    assert found.details["method"] == "features first"
    assert torch.cdist(images.flatten(1), found.images.flatten(1)).min(1).values.max() < 1e-2


def test_what_does_not_separate_is_none():
    model, images, labels = small_cnn(), pictures(3), torch.tensor([1, 2, 3])
    assert separate_batch(read_layers(model, SHAPE), observed(model, pictures(1).repeat(3, 1, 1, 1), labels), 3) is None
    observation = observed(model, images, labels)
    observation.update["head.0.weight"].normal_()
    assert separate_batch(read_layers(model, SHAPE), observation, 3) is None
    one = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    assert separate_batch(read_layers(one, SHAPE), observed(one, images, labels), 3) is None  # nothing hidden
    bare = nn.Sequential(nn.Flatten(), nn.Linear(256, 30, bias=False), nn.ReLU(), nn.Linear(30, 10))
    assert separate_batch(read_layers(bare, SHAPE), observed(bare, images, labels), 3) is None
    assert separate_batch([], observation, 3) is None


def test_what_does_not_split_is_none():
    model = small_cnn(hidden=(60,), activation="sigmoid")
    observation = observed(model, pictures(3), torch.tensor([1, 2, 3]))
    assert split_batch(read_layers(model, SHAPE), observation, 3) is None  # no zeros
    same = pictures(1).repeat(3, 1, 1, 1)
    model = small_cnn()
    observation = observed(model, same, torch.tensor([1, 1, 1]))
    assert split_batch(read_layers(model, SHAPE), observation, 3, draws=4096) is None  # rank one
    assert split(torch.randn(4, 9), torch.randn(4), 6, lambda delta, inputs: delta[:, 0]) is None
    random = split(torch.randn(30, 9), torch.randn(30), 3, lambda d, i: torch.ones(3), draws=4096)
    assert random is None


@pytest.mark.parametrize(
    "settings", [{}, {"pool": "average"}, {"pool": "stride"}, {"activation": "leaky_relu"}, {"activation": "sigmoid"}]
)
def test_the_cold_body_is_the_network_and_a_warm_one_is_near(settings):
    model = small_cnn(**settings).double()
    images, labels = torch.rand(2, *SHAPE, dtype=torch.float64), torch.tensor([3, 5])
    observation = observed(model, images, labels)
    layers = read_layers(model, SHAPE)
    whole = unwind(layers, observation, labels, model.head(model.body(images)).detach())
    weights = {n: p.detach() for n, p in model.named_parameters()}
    assert Body.supported(whole.body)
    body = Body(whole.body, weights, SHAPE, whole.features, whole.by_features)
    features, gradients = body.evaluate(images[None], 0.0)
    assert torch.allclose(features[0], model.body(images), atol=1e-8)
    for name in whole.names:
        assert torch.allclose(gradients[name][0], observation.update[name].flatten(), atol=1e-8), name
    _, warm = body.evaluate(images[None], 1e-3)
    for name in whole.names:
        assert torch.allclose(warm[name][0], gradients[name][0], atol=0.2 * gradients[name].abs().max())


def body_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[Body, dict[str, torch.Tensor]]:
    """The layers below the exact features, and the update."""
    observation = observed(model, images, labels)
    last = model.head(model.body(images)).detach()
    whole = unwind(read_layers(model, SHAPE), observation, labels, last)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return Body(whole.body, weights, SHAPE, whole.features, whole.by_features), observation.update


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_convolution_is_undone_though_some_winners_are_wrong(noise):
    model = small_cnn(channels=(4, 16)).double()
    image = pictures(1).double()
    body, update = body_of(model, image, torch.tensor([3]))
    rough = image + noise * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lower = undo_convolution(body, update, rough)
    true = model.body[:3](image).flatten(1)
    known = lower.known
    assert lower.error < 1e-6
    assert known.float().mean() > 0.9
    assert torch.allclose(lower.features[known], true[known], atol=1e-6)
    through = model.body[:3](image).detach().requires_grad_()
    loss = nn.functional.cross_entropy(model.fc(model.head(model.body[3:](through))), torch.tensor([3]))
    (by_features,) = torch.autograd.grad(loss, through)
    open_ = true > 0
    assert torch.allclose(lower.body.delta[open_], by_features.flatten(1)[open_], atol=1e-8)
    assert undo_convolution(lower.body, update, rough) is None  # the first has nothing below it


def test_what_cannot_be_undone_is_none():
    model = small_cnn(channels=(4, 16)).double()
    image = pictures(1).double()
    body, update = body_of(model, image, torch.tensor([3]))
    random = {n: torch.randn(v.shape, generator=torch.Generator().manual_seed(0)) for n, v in update.items()}
    assert undo_convolution(body, random, image) is None
    assert undo_convolution(body, {n: torch.zeros_like(v) for n, v in update.items()}, image) is None
    assert undo_convolution(body, update, image.repeat(400, 1, 1, 1)) is None  # more unknowns than equations


def test_without_a_pooling_whose_winners_count_all_starts_begin_below():
    model = small_cnn(pool="stride")
    image, label = pictures(1), torch.tensor([3])
    inversion = FeaturesFirst(starts=1, stages=3, evaluations=2)
    (found,) = inversion.invert([observed(model, image, label)], [None], Knowledge(model, SHAPE, 10), Run())
    assert (found.details["undone"], len(found.trace)) == (1, 3)


def test_features_first_finds_an_image_through_pooling():
    model = small_cnn(channels=(6, 16))
    image, label = pictures(1, seed=3), torch.tensor([3])
    inversion = FeaturesFirst(starts=2, evaluations=60)
    knowledge = Knowledge(model, SHAPE, 10)
    (found,) = inversion.invert([observed(model, image, label)], [None], knowledge, Run())
    assert found.labels.tolist() == [3]
    assert (found.images - image).square().mean() < 1e-3
    assert found.details["method"] == "features"
    assert len(found.trace) == len(found.snapshots) == 20  # through both convolutions, then below the second
    assert found.details["undone"] == 1
    assert torch.equal(found.snapshots[-1][1], found.images.half())
    short = FeaturesFirst(starts=1, stages=3, evaluations=3)
    one, again = (short.invert([observed(model, image, label)], [None], knowledge, Run())[0] for _ in range(2))
    assert torch.equal(one.images, again.images)


def test_auxiliary_images_with_the_nearest_features_are_starts():
    model = small_cnn()
    image, label = pictures(1), torch.tensor([3])
    auxiliary = torch.cat([pictures(8, seed=1), image]), torch.arange(9)
    knowledge = Knowledge(model, SHAPE, 10, auxiliary=auxiliary)
    inversion = FeaturesFirst(starts=1, stages=3, evaluations=2)
    (found,) = inversion.invert([observed(model, image, label)], [None], knowledge, Run())
    assert (found.images - image).square().mean() < 1e-2  # it began there


def test_time_that_is_over_ends_the_search():
    model = small_cnn()
    observation = observed(model, pictures(1), torch.tensor([3]))
    (found,) = FeaturesFirst().invert([observation], [None], Knowledge(model, SHAPE, 10), Run(seconds=1e-3))
    assert found.stop_reason == "budget"
    assert found.evaluations < 100


def test_what_features_first_does_not_take_is_refused():
    model = small_cnn(norm="batch")
    observation = observed(model, pictures(2), torch.tensor([3, 4]))
    with pytest.raises(UsageError, match=r"attack\.inversion=features .*attack=fedleak"):
        FeaturesFirst().invert([observation], [None], Knowledge(model, SHAPE, 10), Run())
    for wrong in ({"starts": 0}, {"stages": 2}, {"evaluations": 0}, {"prior": "none"}):
        with pytest.raises(UsageError, match=f"inversion.{next(iter(wrong))}="):
            FeaturesFirst(**wrong)


def matching() -> GradientMatching:
    return GradientMatching(start="grey", max_evaluations=3, restarts=1)


def test_the_chooser_takes_what_fits_and_says_why():
    chooser = Chooser(Peeling(matching()), FeaturesFirst(starts=1, stages=3, evaluations=3))
    one, label = pictures(1), torch.tensor([3])
    guess = LabelGuess(label[None], torch.ones(1))

    def method(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[str, str, str]:
        guess = LabelGuess(labels[None], torch.ones(1))
        knowledge = Knowledge(model, SHAPE, 10)
        (found,) = chooser.invert([observed(model, images, labels)], [guess], knowledge, Run())
        return found.details["method"], found.details["why"], found.stop_reason

    how, why, stop = method(small_cnn(), one, label)
    assert (how, "unwind" in why, stop.endswith("by features first")) == ("features first", True, True)
    torch.manual_seed(0)
    assert method(LeNet(SHAPE, 10), one, label)[0] == "closed_form"
    how, why, stop = method(small_cnn(norm="batch"), pictures(2), torch.tensor([1, 3]))
    assert (how, stop) == ("gradient matching", "budget")
    assert "branches" in why
    how, why, _ = method(small_cnn(activation="sigmoid"), pictures(6), torch.arange(6))
    assert (how, "too much alike" in why) == ("gradient matching", True)
    with pytest.raises(UsageError, match=r"^inversion\.seconds=0"):
        Chooser(seconds=0)
    assert guess.best.tolist() == [3]


def test_matching_ends_when_its_time_is_over():
    model = MLP(SHAPE, 10, hidden=(20,))
    observation = observed(model, pictures(1), torch.tensor([3]))
    guess = LabelGuess(torch.tensor([[3]]), torch.ones(1))
    inversion = GradientMatching(tolerance=0.0, patience=10**6, max_evaluations=10**6, restarts=3)
    (found,) = inversion.invert([observation], [guess], Knowledge(model, SHAPE, 10), Run(seconds=0.3))
    assert found.stop_reason in ("budget", "diverged")
    assert found.seconds < 5
