import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedleak.attacks.row_space import batch_features, row_space, sample_roots


def batches(count, labels, classes=40, width=60, seed=0):
    """Features and the last layer's gradients of `count` batches through fresh layers, in float32 as a client sends."""
    generator = torch.Generator().manual_seed(seed)
    fields = []
    for _ in range(count):
        layer = nn.Linear(width, classes)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
        mean = torch.rand(width, generator=generator)
        features = (mean + 0.1 * torch.randn(len(labels), width, generator=generator)).sigmoid()
        loss = F.cross_entropy(layer(features), torch.tensor(labels))
        gradients = torch.autograd.grad(loss, [layer.weight, layer.bias])
        fields.append([features, layer.weight.detach(), layer.bias.detach(), *gradients])
    return [torch.stack(column) for column in zip(*fields, strict=True)]


@pytest.mark.parametrize(
    "labels",
    [[3], [3, 7], [0, 5, 9, 21, 33], [4, 4], [1, 1, 2, 2, 8], [6, 6, 6, 30]],
    ids=["one", "two", "distinct", "pair", "two pairs", "triple"],
)
def test_every_sample_gets_its_own_features(labels):
    truth, *layer = batches(3, labels)
    result = batch_features(*layer, torch.tensor([labels] * 3))
    found = result.features
    assert result.error.max() < 1e-8
    for batch in range(3):
        distance = torch.cdist(found[batch].float(), truth[batch])
        assert sorted(distance.argmin(1).tolist()) == list(range(len(labels)))
        assert distance.min(1).values.max() < 1e-2
        for sample, nearest in enumerate(distance.argmin(1).tolist()):
            assert labels[sample] == labels[nearest]


def test_the_residual_tells_present_labels_from_absent_ones():
    labels = [2, 11, 17, 30]
    _, *layer = batches(4, labels)
    weight, bias, *gradients = layer
    roots = sample_roots(row_space(*gradients, weight, bias, 4), torch.arange(40).expand(4, -1))
    best = roots.residual.amin(-1)
    present = torch.zeros(40, dtype=torch.bool)
    present[labels] = True
    assert best[:, present].max() < 1e-8
    assert best[:, ~present].min() > 1e-4


def test_a_wrong_label_is_seen_in_the_error():
    _, *layer = batches(2, [2, 11, 17, 30])
    assert batch_features(*layer, torch.tensor([[2, 11, 17, 31]] * 2)).error.min() > 1e-4


def test_batched_equals_one_at_a_time():
    labels = torch.tensor([[2, 2, 17, 30]] * 3)
    _, *layer = batches(3, labels[0].tolist())
    together = batch_features(*layer, labels).features
    for index in range(3):
        alone = batch_features(*(v[index : index + 1] for v in layer), labels[:1]).features
        torch.testing.assert_close(alone[0], together[index], rtol=0, atol=1e-4)


def test_the_claimed_error_is_the_real_one():
    labels = [2, 2, 11, 17, 30]
    truth, *layer = batches(6, labels, seed=3)
    generator = torch.Generator().manual_seed(0)
    for std in (0.0, 1e-6):
        noisy = [v + std * torch.randn(v.shape, generator=generator) for v in layer[2:]]
        result = batch_features(*layer[:2], *noisy, torch.tensor([labels] * 6))
        nearest = torch.cdist(result.features.float(), truth).min(-1).values / truth.shape[-1] ** 0.5
        ratio = nearest / result.std
        assert 0.2 < ratio.median() < 5
        assert ratio.max() < 20
