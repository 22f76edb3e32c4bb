from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedleak.local_update import local_update
from fedleak.models import LeNet
from fedleak.training import SGD, Adam, LocalTraining


def sgd(model, images, labels, lr, steps):
    """The plain PyTorch loop, as the independent reference."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    total = None
    for x, y in zip(images.chunk(steps), labels.chunk(steps), strict=True):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
        optimizer.step()
    return total, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("payload", ["gradient", "weights"])
def test_it_is_plain_sgd(steps, payload):
    torch.manual_seed(0)
    model = LeNet((1, 12, 12), 4)
    images, labels = torch.rand(2 * steps, 1, 12, 12), torch.randint(0, 4, (2 * steps,))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = local_update(model, start, {}, images, labels, LocalTraining(payload, None, steps, optimizer=SGD(0.3)))
    assert all(torch.equal(start[n], p) for n, p in model.named_parameters()), "the model itself must not change"
    total, weights = sgd(model, images, labels, 0.3, steps)
    expected = total if payload == "gradient" else weights
    for value, reference in zip(result.update.values(), expected, strict=True):
        torch.testing.assert_close(value, reference)


def test_per_sample_gradients_average_to_the_batch_gradient():
    torch.manual_seed(0)
    model = LeNet((1, 12, 12), 4)
    images, labels = torch.rand(3, 1, 12, 12), torch.tensor([0, 3, 3])
    start = {n: p.detach() for n, p in model.named_parameters()}
    batch = local_update(model, start, {}, images, labels, LocalTraining(local_steps=1))
    single = local_update(model, start, {}, images, labels, LocalTraining(local_steps=1, per_sample=True))
    assert single.loss == pytest.approx(batch.loss, rel=1e-5)
    for name, value in batch.update.items():
        assert single.update[name].shape == (3, *value.shape)
        torch.testing.assert_close(single.update[name].mean(0), value)


def test_batchnorm_runs_in_the_mode_asked_for_and_its_buffers_come_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * 36, 3))
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    start = {n: p.detach() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    trained = local_update(model, start, buffers, images, labels, LocalTraining(local_steps=1))
    frozen = local_update(model, start, buffers, images, labels, LocalTraining(local_steps=1, training_mode=False))
    assert not torch.equal(trained.buffers["1.running_mean"], buffers["1.running_mean"])
    assert torch.equal(frozen.buffers["1.running_mean"], buffers["1.running_mean"])
    assert torch.equal(buffers["1.running_mean"], torch.zeros(2)), "what was handed in must not change"
    assert not torch.allclose(trained.update["0.weight"], frozen.update["0.weight"])


@pytest.mark.parametrize("optimizer", [SGD(0.3, momentum=0.9, nesterov=True), Adam(0.01)], ids=str)
def test_epochs_and_optimisers_are_those_of_torch(optimizer):
    torch.manual_seed(0)
    model = LeNet((1, 12, 12), 4).double()
    images, labels = torch.rand(6, 1, 12, 12).double(), torch.randint(0, 4, (6,))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    training = LocalTraining("weights", 2, 3, epochs=2, optimizer=optimizer)
    result = local_update(model, start, {}, images, labels, training)
    arguments = asdict(optimizer)
    arguments.pop("decoupled", None)
    theirs = getattr(torch.optim, type(optimizer).__name__)(model.parameters(), **arguments)
    for _ in range(2):
        for x, y in zip(images.chunk(3), labels.chunk(3), strict=True):
            theirs.zero_grad()
            cross_entropy(model(x), y).backward()
            theirs.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(result.update[name], value.detach())


def test_examples_are_defended_one_by_one_inside_the_step():
    torch.manual_seed(0)
    model = LeNet((1, 12, 12), 4)
    images, labels = torch.rand(4, 1, 12, 12), torch.tensor([0, 3, 3, 1])
    start = {n: p.detach() for n, p in model.named_parameters()}
    training = LocalTraining("weights", 2, 2, optimizer=SGD(0.1))
    seen = []

    def note(gradients):
        seen.append({name: value.shape[0] for name, value in gradients.items()})
        return gradients

    plain = local_update(model, start, {}, images, labels, training)
    noted = local_update(model, start, {}, images, labels, training, examples=note)
    assert seen == [dict.fromkeys(start, 2)] * 2
    assert noted.loss == pytest.approx(plain.loss, rel=1e-5)
    halved = local_update(
        model, start, {}, images, labels, training, examples=lambda g: {n: v * 0 for n, v in g.items()}
    )
    for name, value in start.items():
        torch.testing.assert_close(noted.update[name], plain.update[name])
        assert torch.equal(halved.update[name], value)
