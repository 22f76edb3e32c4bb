import pytest
import torch
from torch import nn

from fedleak.attacks.base import Run
from fedleak.attacks.labels import Fedleak, Learned, Version1
from fedleak.attacks.labels.counting import collect
from fedleak.attacks.labels.last_layer import find_last_layer
from fedleak.attacks.labels.posterior import domain_images, label_posterior
from fedleak.capture import Observation
from fedleak.errors import UsageError
from fedleak.threat import ThreatModel


def prototypes(count, seed):
    """Images of ten easy classes: a prototype each, and noise."""
    centres = torch.rand(10, 1, 12, 12, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    noise = 0.35 * torch.randn(count, 1, 12, 12, generator=generator)
    return (centres[labels] + noise).clamp(0, 1), labels


@pytest.fixture(scope="module")
def trained():
    """A network that is right on nearly every image of these classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 24), nn.Sigmoid(), nn.Linear(24, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    images, labels = prototypes(2000, 1)
    for step in range(400):
        part = slice(step % 20 * 100, step % 20 * 100 + 100)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
    fresh, names = prototypes(500, 2)
    assert float((model(fresh).argmax(dim=1) == names).float().mean()) > 0.95
    return model


@pytest.mark.parametrize("aux", [True, False])
def test_batches_of_a_trained_model_are_read_exactly(aux, trained, observe, knowing):
    knowledge = knowing(trained, auxiliary=prototypes(200, 4) if aux else None)
    observations, truth = [], []
    for seed in range(4):
        images, labels = prototypes(6, 10 + seed)
        observations.append(observe(trained, images, labels, round=seed + 1))
        truth.append(labels.sort().values.tolist())
    guesses = Fedleak(starts=128).infer(observations, knowledge, Run(), candidates=3)
    assert sum(guess.best.tolist() == labels for guess, labels in zip(guesses, truth, strict=True)) >= 3
    for guess in guesses:
        assert guess.labels.shape == (3, 6)
        assert (guess.labels.diff(dim=1) >= 0).all()
        assert len({tuple(row) for row in guess.labels.tolist()}) == 3
        assert (guess.confidence.diff() <= 0).all()


def test_a_single_sample_follows_the_sign_rule(observe, lenet, knowing):
    model = lenet(0)
    observation = observe(model, torch.rand(1, 1, 12, 12), torch.tensor([6]))
    assert Fedleak().infer([observation], knowing(model), Run(), candidates=2)[0].best.tolist() == [6]


@pytest.mark.parametrize(
    ("steps", "least", "payload", "uniform"),
    [
        (1, 0.98, "gradient", True),
        (1, 0.98, "gradient", False),
        (1, 0.98, "weights", True),
        (1, 0.98, "weights", False),
        pytest.param(
            4, 0.85, "gradient", False, marks=pytest.mark.slow
        ),  # these simulate clients, at twenty times the cost
        (4, 0.85, "weights", True),
    ],
)
def test_large_batches_of_untrained_models(steps, least, payload, uniform, observe, lenet, knowing):
    observations, truth = [], []
    for seed in range(4):
        images, labels = prototypes(40, seed)
        observations.append(
            observe(lenet(seed, uniform=uniform), images, labels, payload=payload, steps=steps, lr=0.01)
        )
        truth.append(torch.bincount(labels, minlength=10))
    knowledge = knowing(lenet(0), auxiliary=prototypes(300, 7), threat=ThreatModel(auxiliary_data=True))
    guesses = Fedleak().infer(observations, knowledge, Run())
    overlap = [
        float(torch.minimum(torch.bincount(guess.best, minlength=10), counts).sum()) / 40
        for guess, counts in zip(guesses, truth, strict=True)
    ]
    assert sum(overlap) / 4 > least


def test_a_layer_without_bias(observe, lenet, knowing):
    for seed, size in ((0, 5), (1, 30)):
        model = lenet(seed, uniform=True, bias=False)
        images, labels = prototypes(size, seed)
        guess = Fedleak().infer([observe(model, images, labels)], knowing(model), Run())[0]
        found = torch.bincount(guess.best, minlength=10)
        assert int(torch.minimum(found, torch.bincount(labels, minlength=10)).sum()) >= 0.9 * size


def test_an_unknown_scale_still_gives_version_1(observe, lenet, knowing):
    model = lenet(2, uniform=True)
    observation = observe(model, *prototypes(7, 3), payload="weights", grant_lr=False)
    guesses = [
        method.infer([observation], knowing(model), Run())[0].best.tolist() for method in (Fedleak(), Version1())
    ]
    assert guesses[0] == guesses[1]


def test_an_update_that_is_noise_falls_back_to_a_full_batch(observe, lenet, knowing):
    model = lenet(2)
    observation = observe(model, *prototypes(6, 3))
    generator = torch.Generator().manual_seed(0)
    for value in observation.update.values():
        value.copy_(torch.randn(value.shape, generator=generator))
    guess = Fedleak(starts=32, rounds=1).infer([observation], knowing(model), Run(), candidates=4)[0]
    assert guess.labels.shape == (4, 6)


def test_guesses_do_not_depend_on_what_else_is_in_the_call(observe, lenet, knowing):
    observations = [observe(lenet(seed, uniform=True), *prototypes(size, seed), round=seed + 1)
                    for seed, size in enumerate((1, 5, 5, 24))]  # fmt: skip
    broken = Observation(9, 0, {}, {}, error="the client raised ValueError")
    knowledge = knowing(lenet(0))
    method = Fedleak(starts=64, rounds=1)
    together = method.infer([*observations, broken], knowledge, Run(seed=4), candidates=2)
    assert together[-1] is None
    for observation, guess in zip(observations, together, strict=False):
        assert torch.equal(method.infer([observation], knowledge, Run(seed=4), candidates=2)[0].labels, guess.labels)


@pytest.mark.parametrize("method", [Fedleak(), Learned()])
def test_a_withheld_batch_size_is_refused(method, observe, lenet, knowing):
    model = lenet(3)
    with pytest.raises(UsageError, match=r"threat\.batch_size=true"):
        method.infer([observe(model, *prototypes(2, 0), batch_size=None)], knowing(model), Run())


def test_the_posterior_knows_when_it_does_not_know(trained, observe, lenet, knowing):
    """Where it is right its spread is small; on a trained model it is too large to leave the search out."""
    spreads = []
    for model in (lenet(0), trained):
        observation = observe(model, *prototypes(8, 5))
        knowledge = knowing(model, auxiliary=prototypes(300, 7))
        evidence = collect([observation], find_last_layer(knowledge))
        spreads.append(float(label_posterior(evidence, knowledge, seed=0).spread))
    assert spreads[0] < 0.5 / 6
    assert spreads[1] > 0.5 / 6


def test_domain_images_are_images_of_many_kinds(lenet, knowing):
    images = domain_images(knowing(lenet(0)), 8, 4, 0)
    assert images.shape == (32, 1, 12, 12)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    brightness = images.view(8, -1).mean(dim=1)
    assert float(brightness.max() - brightness.min()) > 0.2
    assert torch.equal(images, domain_images(knowing(lenet(0)), 8, 4, 0))


@pytest.mark.parametrize("aux", [True, False])
def test_the_learned_reader_beats_the_control(aux, observe, lenet, knowing):
    observations, truth = [], []
    for seed in range(6):
        images, labels = prototypes(16, seed)
        observations.append(observe(lenet(seed, uniform=seed % 2 == 0), images, labels))
        truth.append(torch.bincount(labels, minlength=10))
    knowledge = knowing(lenet(0), auxiliary=prototypes(200, 7) if aux else None)
    before = torch.random.get_rng_state()
    guesses = Learned(steps=150).infer(observations, knowledge, Run(seed=1))
    assert torch.equal(before, torch.random.get_rng_state())
    overlap = [
        float(torch.minimum(torch.bincount(guess.best, minlength=10), counts).sum()) / 16
        for guess, counts in zip(guesses, truth, strict=True)
    ]
    assert sum(overlap) / 6 > 0.85
    again = Learned(steps=150).infer(observations, knowledge, Run(seed=1))
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(guesses, again, strict=True))


@pytest.mark.parametrize("count", [1, 5, 30])
def test_a_handful_of_auxiliary_images_does(count, observe, lenet, knowing):
    model = lenet(1)
    images, labels = prototypes(24, 3)
    few = prototypes(count, 8)
    if count == 30:
        few = few[0], torch.zeros_like(few[1])  # all of one class
    knowledge = knowing(model, auxiliary=few, threat=ThreatModel(auxiliary_data=True))
    guess = Fedleak().infer([observe(model, images, labels)], knowledge, Run())[0]
    assert guess.best.tolist() == labels.sort().values.tolist()


def test_batches_up_to_thousands_and_any_number_of_classes(observe, lenet, knowing):
    for classes, size in ((2, 4096), (30, 64), (210, 8)):
        model = lenet(1, classes)
        labels = torch.randint(classes, (size,), generator=torch.Generator().manual_seed(size))
        images = torch.rand(size, 1, 12, 12, generator=torch.Generator().manual_seed(size))
        guess = Fedleak(largest=4).infer([observe(model, images, labels)], knowing(model, classes), Run())[0]
        found = torch.bincount(guess.best, minlength=classes)
        overlap = torch.minimum(found, torch.bincount(labels, minlength=classes)).sum()
        assert guess.best.shape == (size,)
        assert int(overlap) > 0.95 * size
