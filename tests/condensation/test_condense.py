"""Condensation on a toy data set, its parts against plain torch, and what is kept of it."""

import pytest
import torch
from torch import nn

from fedleak import tensorfile
from fedleak.condensation import FILE, Condensed, ConvNet, Recipe, Trainer, condense, load_condensed, save_condensed
from fedleak.condensation.condense import distance_of
from fedleak.condensation.evaluate import jitter
from fedleak.errors import UsageError


def halves(count=60, seed=0):
    """Images 1×8×8, bright on the left (0) or on the right (1), with noise."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = 0.3 * torch.rand(count, 1, 8, 8, generator=random)
    for image, label in zip(images, labels, strict=True):
        image[..., 4 * label : 4 * label + 4] += 0.6
    return images, labels


def network(seed):
    torch.manual_seed(seed)
    return ConvNet((1, 8, 8), 2, width=4, depth=2)


def test_networks_learn_from_the_condensed_images_what_tells_the_classes_apart():
    images, labels = halves()
    told = []
    recipe = Recipe(1, networks=15, batch_size=16, lr=0.5)
    made, of = condense(images, labels, 2, recipe, network, on_network=lambda progress, distance: told.append(distance))
    assert made.shape == (2, 1, 8, 8)
    assert of.tolist() == [0, 1]
    assert made.min() >= 0
    assert made.max() <= 1
    assert len(told) == 15
    assert sum(told[-3:]) < 0.8 * sum(told[:3])
    sides = made.mean((1, 2))
    assert sides[0, :4].mean() > sides[0, 4:].mean()
    assert sides[1, :4].mean() < sides[1, 4:].mean()
    accuracy = Trainer(epochs=40).accuracy(network(99), made, of, *halves(seed=1), seed=0)
    assert accuracy > 0.95


def test_several_matches_train_the_network_between_them_and_a_seed_decides_everything():
    images, labels = halves(20)
    recipe = Recipe(2, networks=2, matches=3, train_epochs=2, batch_size=4, start="real")
    first, again, other = (condense(images, labels, 2, recipe, network, seed=seed, bounded=False) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    once = condense(images, labels, 2, Recipe(2, networks=2, matches=1, batch_size=4, start="real"), network)
    assert not torch.equal(first[0], once[0])


@pytest.mark.parametrize(("count", "loops"), [(1, (1, 1)), (10, (10, 50)), (50, (50, 10)), (5, (5, 100))])
def test_the_loops_are_the_published_ones(count, loops):
    assert Recipe(count).loops == loops


def test_the_distance_is_one_minus_the_cosine_of_every_output_and_leaves_biases_out():
    torch.manual_seed(0)
    a, b = ([torch.randn(shape) for shape in ((3, 2, 5, 5), (3,), (4, 7))] for _ in range(2))
    cosines = [nn.functional.cosine_similarity(x.flatten(1), y.flatten(1), dim=1) for x, y in zip(a, b, strict=True)
               if x.dim() > 1]  # fmt: skip
    assert float(distance_of(a, b)) == pytest.approx(float(sum((1 - c).sum() for c in cosines)), rel=1e-4)


def test_training_is_that_of_torch():
    images, labels = halves(8)
    model, theirs = network(3), network(3)
    start = {name: value.detach() for name, value in model.named_parameters()}
    found = Trainer(epochs=4, batch_size=8).train(model, start, images, labels, seed=0)
    for lr in (0.01, 0.001):  # a tenth in the second half, with a new momentum
        optimizer = torch.optim.SGD(theirs.parameters(), lr, momentum=0.9, weight_decay=5e-4)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(theirs(images), labels).backward()
            optimizer.step()
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=1e-6)


def test_jitter_moves_images_and_leaves_constant_ones():
    random = torch.Generator().manual_seed(0)
    images = torch.rand(12, 3, 9, 9)
    moved = jitter(images, random)
    assert moved.shape == images.shape
    assert all((a - b).abs().max() > 0.01 for a, b in zip(moved, images, strict=True))
    flat = torch.full((4, 1, 9, 9), 0.7)
    torch.testing.assert_close(jitter(flat, random), flat)


@pytest.mark.parametrize(("size", "features"), [(28, 4 * 4), (32, 4 * 4), (17, 2 * 2)])
def test_the_network_pads_images_of_28_pixels_as_published(size, features):
    model = ConvNet((1, size, size), 10, width=5)
    assert model.fc.in_features == 5 * features
    assert model(torch.rand(2, 1, size, size)).shape == (2, 10)


@pytest.mark.parametrize(("settings", "message"), [({"width": 0}, "model.width=0"), ({"depth": 9}, "model.depth=9")])
def test_impossible_networks_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        ConvNet((1, 28, 28), 10, **settings)


def test_what_is_kept_is_read_again_and_anything_else_is_refused(tmp_path):
    images, labels = halves(4)
    save_condensed(tmp_path / FILE, Condensed(images, labels, ["left", "right"], {"_target_": "fedleak.data.digits"}))
    found = load_condensed(str(tmp_path))
    torch.testing.assert_close(found.images, images.clamp(0, 1), rtol=0, atol=1 / 510 + 1e-6)
    assert torch.equal(found.labels, labels)
    assert found.class_names == ["left", "right"]
    with pytest.raises(UsageError, match=r"data\.root=None: holds no condensed\.safetensors"):
        load_condensed(None)
    tensorfile.save(tmp_path / "other" / FILE, {"images": images})
    with pytest.raises(UsageError, match=r"auxiliary=.*no condensed data set"):
        load_condensed(str(tmp_path / "other"), "auxiliary")
