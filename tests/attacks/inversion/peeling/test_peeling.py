import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedleak.attacks.base import Inversion, Knowledge, LabelGuess, Run
from fedleak.attacks.inversion.gradient_matching import GradientMatching
from fedleak.attacks.inversion.peeling import Peeling, closed_form
from fedleak.attacks.inversion.peeling.chain import Chain
from fedleak.attacks.inversion.peeling.recursion import last_delta
from fedleak.attacks.results import Reconstruction
from fedleak.attacks.row_space import samples
from fedleak.capture import Observation
from fedleak.errors import UsageError
from fedleak.models.lenet import LeNet
from fedleak.training import SGD, LocalTraining


def fresh(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return model


def image(shape: tuple[int, int, int], seed: int) -> Tensor:
    """Blobs and edges in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, shape[0], 5, 5, generator=generator)
    smooth = F.interpolate(coarse, shape[1:], mode="bicubic", align_corners=True)
    return (smooth + 0.3 * (torch.rand(1, *shape, generator=generator) > 0.8)).clamp(0, 1)


def observe(model: nn.Module, images: Tensor, labels: Tensor, client: int = 0) -> Observation:
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), list(parameters.values()))
    start = {name: value.detach().clone() for name, value in parameters.items()}
    update = dict(zip(parameters, gradients, strict=True))
    return Observation(1, client, start, update, LocalTraining(batch_size=len(images), local_steps=1))


def victims(shape, classes, seeds, build=LeNet):
    images = [image(shape, seed) for seed in seeds]
    observations = [
        observe(fresh(build(shape, classes), seed), x, torch.tensor([seed % classes]), seed)
        for seed, x in zip(seeds, images, strict=True)
    ]
    return observations, images, Knowledge(build(shape, classes), shape, classes)


def guess(*labels: int) -> LabelGuess:
    return LabelGuess(torch.tensor([labels]), torch.ones(1))


def mse(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).square().mean())


def mlp(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 20), nn.Sigmoid(), nn.Linear(20, classes))


class Standardise(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.45) / 0.25


def normalised(shape, classes):
    return nn.Sequential(Standardise(), LeNet(shape, classes))


def tanh_convs(shape, classes):
    return nn.Sequential(
        nn.Conv2d(shape[0], 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 6, 3, padding=1, dilation=1, bias=False),
        nn.LeakyReLU(0.3),
        nn.Flatten(),
        nn.Linear(6 * shape[1] * shape[2], 16),
        nn.Sigmoid(),
        nn.Linear(16, classes, bias=False),
    )


@pytest.mark.parametrize(
    ("shape", "classes", "build", "limit"),
    [
        ((1, 28, 28), 10, LeNet, 1e-8),
        ((1, 28, 28), 2, LeNet, 1e-8),
        ((3, 16, 16), 100, LeNet, 1e-7),
        ((2, 13, 18), 7, LeNet, 1e-5),
        ((3, 12, 9), 10, mlp, 1e-8),
        ((1, 8, 10), 5, tanh_convs, 1e-8),
        ((2, 12, 9), 10, normalised, 1e-5),
    ],
    ids=["mnist", "two classes", "colour", "odd", "mlp", "tanh, no bias", "normalised"],
)
def test_the_image_is_the_true_one(shape, classes, build, limit):
    observations, images, knowledge = victims(shape, classes, range(5), build)
    found = closed_form(observations, [None] * 5, knowledge)
    assert max(mse(x, truth) for x, truth in zip(found, images, strict=True)) < limit
    for result, seed, truth in zip(
        Peeling().invert(observations, [None] * 5, knowledge, Run()), range(5), images, strict=True
    ):
        assert result.stop_reason == "converged"
        assert result.labels.tolist() == [seed % classes]
        assert result.images.dtype == torch.float32
        assert result.images.shape == (1, *shape)
        assert mse(result.images, truth) < limit


@pytest.mark.slow
def test_cifar_shaped_images_are_the_true_ones():
    observations, images, knowledge = victims((3, 32, 32), 100, range(6))
    results = Peeling().invert(observations, [None] * 6, knowledge, Run())
    assert all(result.stop_reason == "converged" for result in results)
    assert max(mse(r.images, x) for r, x in zip(results, images, strict=True)) < 1e-5


def test_batched_equals_one_at_a_time():
    observations, _, knowledge = victims((3, 12, 12), 10, range(4))
    together = closed_form(observations, [None] * 4, knowledge)
    for index in range(4):
        (alone,) = closed_form([observations[index]], [None], knowledge)
        assert mse(alone, together[index]) < 1e-10


def test_new_weights_are_read_as_their_gradient():
    observations, images, knowledge = victims((1, 16, 16), 10, range(2))
    lr = 0.05
    training = LocalTraining("weights", 1, 1, optimizer=SGD(lr))
    sent = [
        replace(o, update={n: o.parameters[n] - lr * g for n, g in o.update.items()}, training=training)
        for o in observations
    ]
    for found, truth in zip(closed_form(sent, [None] * 2, knowledge), images, strict=True):
        assert mse(found, truth) < 1e-5


def test_a_gradient_for_every_sample():
    shape = (1, 16, 16)
    model, images = fresh(LeNet(shape, 10), 3), torch.cat([image(shape, seed) for seed in range(3)])
    labels = torch.tensor([7, 2, 7])
    each = [observe(model, x[None], y[None]) for x, y in zip(images, labels, strict=True)]
    update = {name: torch.stack([o.update[name] for o in each]) for name in each[0].update}
    observation = replace(each[0], update=update, training=LocalTraining("gradient", 3, 1, per_sample=True))
    (result,) = Peeling().invert([observation], [guess(2, 7, 7)], Knowledge(model, shape, 10), Run())
    assert result.stop_reason == "converged"
    assert result.labels.tolist() == [7, 2, 7]
    assert mse(result.images, images) < 1e-6


def test_a_wrong_label_is_not_called_converged():
    observations, _, knowledge = victims((1, 16, 16), 10, [4])
    (wrong,) = Peeling().invert(observations, [guess(5)], knowledge, Run())
    (right,) = Peeling().invert(observations, [guess(4)], knowledge, Run())
    assert wrong.stop_reason == "stalled"
    assert right.stop_reason == "converged"
    assert wrong.objective > 1e3 * right.objective


def test_a_noise_update_is_not_called_converged_and_looks_like_nothing():
    observations, images, knowledge = victims((1, 16, 16), 10, range(2))
    generator = torch.Generator().manual_seed(0)
    noise = [
        replace(o, update={n: torch.randn(g.shape, generator=generator) for n, g in o.update.items()})
        for o in observations
    ]
    for result, truth in zip(Peeling().invert(noise, [None] * 2, knowledge, Run()), images, strict=True):
        assert result.stop_reason == "stalled"
        assert mse(result.images, truth) > 1e-2


def test_noise_in_the_update_costs_quality_gradually():
    observations, images, knowledge = victims((1, 16, 16), 10, range(3))
    errors = []
    for std in (1e-6, 1e-5, 1e-4):
        generator = torch.Generator().manual_seed(0)
        sent = [
            replace(o, update={n: g + std * torch.randn(g.shape, generator=generator) for n, g in o.update.items()})
            for o in observations
        ]
        found = closed_form(sent, [None] * 3, knowledge)
        errors.append(sum(mse(x, truth) for x, truth in zip(found, images, strict=True)))
    assert errors[0] < errors[1] < errors[2] < 1e-2


def test_a_broken_update_harms_no_other():
    observations, _, knowledge = victims((1, 16, 16), 10, range(3))
    clean = closed_form(observations, [None] * 3, knowledge)
    broken = {name: value.clone() for name, value in observations[1].update.items()}
    broken["body.2.weight"][0, 0, 0, 0] = torch.nan
    found = closed_form(
        [observations[0], replace(observations[1], update=broken), observations[2]], [None] * 3, knowledge
    )
    for index in (0, 2):
        torch.testing.assert_close(found[index], clean[index], rtol=0, atol=1e-6)
    assert torch.isfinite(found[1]).all()


def test_an_unusable_observation_says_why():
    observations, _, knowledge = victims((1, 16, 16), 10, range(2))
    bad = replace(observations[0], error="client crashed")
    results = Peeling().invert([bad, observations[1]], [None, None], knowledge, Run())
    assert [r.stop_reason for r in results] == ["client crashed", "converged"]
    assert math.isnan(results[0].objective)


class Recorder(Inversion):
    def __init__(self) -> None:
        self.asked: list[int] = []

    def invert(self, observations, guesses, knowledge, run):
        results = []
        for index, (observation, given) in enumerate(zip(observations, guesses, strict=True)):
            self.asked.append(observation.client)
            size = observation.training.batch_size
            found = Reconstruction(
                1, observation.client, torch.zeros(size, 1, 16, 16), given.best, 0.0, 1, 0.0, "budget"
            )
            run.on_result(index, found)
            results.append(found)
        return results


def six(images):
    """A batch of more than half as many samples as classes: not supported."""
    model, labels = fresh(LeNet((1, 16, 16), 10), 9), torch.arange(6)
    return observe(model, torch.cat([images[n % len(images)] for n in range(6)]), labels, 9)


def test_what_is_not_solved_goes_to_the_fallback():
    observations, images, knowledge = victims((1, 16, 16), 10, range(3))
    fallback, seen = Recorder(), {}
    results = Peeling(fallback).invert(
        [observations[0], six(images), observations[1], observations[2]],
        [guess(0), guess(*range(6)), guess(8), guess(2)],
        knowledge,
        Run(on_result=lambda index, result: seen.update({index: result})),
    )
    assert fallback.asked == [9, 1]
    assert [r.client for r in results] == [0, 9, 1, 2]
    assert [r.stop_reason for r in results] == ["converged", "budget", results[2].stop_reason, "converged"]
    assert results[2].stop_reason in ("budget", "stalled")
    assert [seen[index].client for index in range(4)] == [0, 9, 1, 2]


def test_snapshots_lead_to_the_returned_images_or_there_are_none():
    observations, images, knowledge = victims((1, 16, 16), 10, range(2))
    generator = torch.Generator().manual_seed(0)
    noisy = {n: g + 1e-3 * torch.randn(g.shape, generator=generator) for n, g in observations[1].update.items()}
    fallback = GradientMatching(trace_every=1, max_evaluations=5, restarts=1)
    found, matched, closer = Peeling(fallback).invert(
        [observations[0], six(images), replace(observations[1], update=noisy)],
        [guess(0), guess(*range(6)), guess(1)],
        knowledge,
        Run(),
    )
    assert (found.details["method"], found.snapshots) == ("closed_form", [])
    assert [count for count, _ in matched.snapshots][:: len(matched.snapshots) - 1] == [1, 5]
    assert torch.equal(matched.snapshots[-1][1], matched.images.half())
    assert closer.details.get("method") != "closed_form"  # matching went on from the peeled image, and came closer
    assert torch.equal(closer.snapshots[-1][1], closer.images.half())


def test_the_closer_image_is_kept_where_neither_converges():
    observations, _, knowledge = victims((1, 16, 16), 10, range(1))
    generator = torch.Generator().manual_seed(0)
    noisy = {n: g + 1e-3 * torch.randn(g.shape, generator=generator) for n, g in observations[0].update.items()}
    fallback = Recorder()  # black images, not converged
    (result,) = Peeling(fallback).invert([replace(observations[0], update=noisy)], [guess(0)], knowledge, Run())
    assert fallback.asked == [0]
    assert result.stop_reason == "stalled"
    assert result.images.max() > 0
    (alone,) = Peeling().invert([replace(observations[0], update=noisy)], [guess(0)], knowledge, Run())
    assert torch.equal(alone.images, result.images)


def test_without_a_fallback_what_is_not_supported_is_refused():
    observations, images, knowledge = victims((1, 16, 16), 10, range(2))
    assert closed_form([six(images)], [guess(*range(6))], knowledge) == [None]
    assert closed_form([replace(observations[0], training=LocalTraining("gradient", 1, 2))], [guess(0)], knowledge) == [
        None
    ]
    with pytest.raises(UsageError, match="batch_size=6"):
        Peeling().invert([six(images)], [guess(*range(6))], knowledge, Run())
    pooled = Knowledge(nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10)), (1, 16, 16), 10)
    with pytest.raises(UsageError, match="gradient_matching"):
        Peeling().invert([observe(pooled.model, images[0], torch.tensor([1]))], [guess(1)], pooled, Run())


def batch(shape, classes, labels, seed, build=LeNet):
    images = torch.cat([image(shape, 100 * seed + n) for n in range(len(labels))])
    return observe(fresh(build(shape, classes), seed), images, torch.tensor(labels), seed), images


@pytest.mark.parametrize(
    ("shape", "classes", "labels", "build", "limit"),
    [
        ((1, 16, 16), 20, [3, 8, 11], LeNet, 1e-4),
        ((1, 16, 16), 20, [5, 5], LeNet, 1e-4),
        ((1, 12, 9), 10, [1, 4, 4, 8], mlp, 1e-6),
    ],
    ids=["three", "pair with one label", "mlp"],
)
def test_a_batch_that_is_determined_comes_back(shape, classes, labels, build, limit):
    pairs = [batch(shape, classes, labels, seed, build) for seed in range(2)]
    knowledge = Knowledge(build(shape, classes), shape, classes)
    results = Peeling().invert([o for o, _ in pairs], [guess(*labels)] * 2, knowledge, Run())
    for result, (_, truth) in zip(results, pairs, strict=True):
        assert result.stop_reason == "converged"
        assert result.labels.tolist() == labels
        order = (result.images[:, None] - truth[None]).square().flatten(2).mean(2).argmin(1)
        assert sorted(order.tolist()) == list(range(len(labels)))
        assert [labels[n] for n in order] == labels
        assert mse(result.images, truth[order]) < limit


def test_features_that_are_known_are_refined_and_not_sought(monkeypatch):
    shape, classes, labels = (1, 16, 16), 20, [3, 8, 8]
    observation, images = batch(shape, classes, labels, 0)
    knowledge = Knowledge(LeNet(shape, classes), shape, classes)
    (sought,) = Peeling().invert([observation], [guess(*labels)], knowledge, Run())
    with torch.no_grad():
        known = fresh(LeNet(shape, classes), 0).body(images)
    monkeypatch.setattr(samples, "_starts", None)
    noise = torch.randn(known.shape, generator=torch.Generator().manual_seed(0))
    given = replace(guess(*labels), features=known + 1e-4 * noise)
    (result,) = Peeling().invert([observation], [given], knowledge, Run())
    assert result.stop_reason == sought.stop_reason == "converged"
    order = (result.images[:, None] - images[None]).square().flatten(2).mean(2).argmin(1)
    assert order.tolist() == [0, 1, 2]  # as the features stood
    assert mse(result.images, images) < 1e-3


def test_a_batch_with_a_wrong_label_is_not_called_converged():
    observation, _ = batch((1, 16, 16), 20, [3, 8], 0)
    (result,) = Peeling().invert(
        [observation], [guess(3, 9)], Knowledge(LeNet((1, 16, 16), 20), (1, 16, 16), 20), Run()
    )
    assert result.stop_reason == "stalled"


def test_batches_and_single_samples_go_together():
    shape, classes = (1, 16, 16), 20
    pair, images = batch(shape, classes, [3, 8], 0)
    one, single = batch(shape, classes, [7], 1)
    broken = replace(pair, update={n: torch.full_like(g, torch.nan) for n, g in pair.update.items()})
    knowledge = Knowledge(LeNet(shape, classes), shape, classes)
    results = Peeling().invert([pair, one, broken], [guess(3, 8), guess(7), guess(3, 8)], knowledge, Run())
    assert [r.stop_reason for r in results] == ["converged", "converged", "stalled"]
    assert mse(results[0].images, images) < 1e-3
    assert mse(results[1].images, single) < 1e-6
    assert torch.isfinite(results[2].images).all()


@pytest.mark.parametrize("classes", [3, 10])
def test_the_scale_without_a_bias(classes):
    model = fresh(nn.Sequential(nn.Flatten(), nn.Linear(30, classes, bias=False)), classes)
    images = torch.rand(8, 1, 5, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % classes
    chain = Chain.read(model, (1, 5, 6))
    each = [observe(model, x[None], y[None]) for x, y in zip(images, labels, strict=True)]
    parameters, gradients = (
        {"1.weight": torch.stack([getattr(o, field)["1.weight"] for o in each]).double()}
        for field in ("parameters", "update")
    )
    wanted = model(images).softmax(1) - F.one_hot(labels, classes)
    torch.testing.assert_close(
        last_delta(chain.last, parameters, gradients).float(), wanted.detach(), rtol=1e-3, atol=1e-5
    )
