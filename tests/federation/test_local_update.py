import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedleak.federation.local_update import local_update
from fedleak.models import LeNet


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
    result = local_update(model, start, {}, images, labels, local_steps=steps, lr=0.3, payload=payload)
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
    kwargs = {"lr": 0.1, "payload": "gradient"}
    batch = local_update(model, start, {}, images, labels, **kwargs)
    single = local_update(model, start, {}, images, labels, per_sample=True, **kwargs)
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
    kwargs = {"lr": 0.1, "payload": "gradient"}
    trained = local_update(model, start, buffers, images, labels, training_mode=True, **kwargs)
    frozen = local_update(model, start, buffers, images, labels, training_mode=False, **kwargs)
    assert not torch.equal(trained.buffers["1.running_mean"], buffers["1.running_mean"])
    assert torch.equal(frozen.buffers["1.running_mean"], buffers["1.running_mean"])
    assert torch.equal(buffers["1.running_mean"], torch.zeros(2)), "what was handed in must not change"
    assert not torch.allclose(trained.update["0.weight"], frozen.update["0.weight"])
