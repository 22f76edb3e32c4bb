import pytest
import torch
from torch import nn

from fedleak.attacks.base import Run
from fedleak.attacks.labels import Version1
from fedleak.attacks.labels.last_layer import find_last_layer, last_layer_gradients
from fedleak.capture import Observation
from fedleak.errors import UsageError
from fedleak.training import LocalTraining


class Backwards(nn.Module):
    """Defines its head first and calls it last."""

    def __init__(self, bias=True):
        super().__init__()
        self.my_head = nn.Linear(6, 10, bias=bias)
        self.body = nn.Linear(144, 6)

    def forward(self, images):
        return self.my_head(torch.sigmoid(self.body(images.flatten(1))))


def test_the_layer_called_last_is_found_whatever_its_name_and_place(knowing):
    model = Backwards()
    layer = find_last_layer(knowing(model))
    assert (layer.name, layer.weight, layer.bias) == ("my_head", "my_head.weight", "my_head.bias")
    assert (layer.classes, layer.features) == (10, 6)
    assert find_last_layer(knowing(Backwards(bias=False))).bias is None


def test_finding_the_layer_leaves_the_model_as_it_was(knowing):
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(144, 10))
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_last_layer(knowing(model))
    assert model.training
    assert not model[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[2]._forward_hooks


def test_a_model_that_cannot_be_run_falls_back_to_the_order_of_definition(knowing):
    model = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 10))
    assert find_last_layer(knowing(model)).name == "1"


def test_a_bare_linear_layer_has_no_prefix(knowing):
    class Bare(nn.Linear):
        def forward(self, images):
            return super().forward(images.flatten(1))

    assert find_last_layer(knowing(Bare(144, 10))).weight == "weight"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Conv2d(1, 10, 12), nn.Flatten()), "no nn.Linear"),
        (nn.Sequential(nn.Flatten(), nn.Linear(144, 7)), "7 outputs for 10 classes"),
    ],
)
def test_a_model_without_a_final_linear_layer_is_refused(knowing, model, words):
    with pytest.raises(UsageError, match=words):
        find_last_layer(knowing(model))


@pytest.mark.parametrize("payload", ["gradient", "weights"])
@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_have_autograds_sign_and_scale(observe, lenet, knowing, payload, steps):
    model = lenet(0).double()
    images, labels = torch.rand(6, 1, 12, 12, dtype=torch.float64), torch.tensor([0, 1, 1, 5, 9, 9])
    lr = 1e-7 if steps > 1 else 0.1  # so small that the model stands still: the mean gradient is that at the start
    observation = observe(model, images, labels, payload=payload, steps=steps, lr=lr)
    found = last_layer_gradients([observation, observation], find_last_layer(knowing(model)))
    loss = nn.functional.cross_entropy(model(images), labels)
    weight, bias = torch.autograd.grad(loss, [model.fc.weight, model.fc.bias])
    torch.testing.assert_close(found.weight, torch.stack([weight] * 2), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found.bias, torch.stack([bias] * 2), rtol=1e-4, atol=1e-8)


def test_a_withheld_learning_rate_leaves_a_positive_factor(observe, lenet, knowing):
    model = lenet(0)
    data = torch.rand(4, 1, 12, 12), torch.tensor([0, 1, 1, 5])
    layer = find_last_layer(knowing(model))
    known = last_layer_gradients([observe(model, *data, payload="weights")], layer).weight
    blind = last_layer_gradients([observe(model, *data, payload="weights", grant_lr=False)], layer).weight
    torch.testing.assert_close(blind, known * 0.1, rtol=1e-3, atol=1e-7)


def test_per_sample_updates_are_averaged(observe, lenet, knowing):
    model = lenet(0)
    images, labels = torch.rand(3, 1, 12, 12), torch.tensor([2, 2, 7])
    singles = [observe(model, images[i : i + 1], labels[i : i + 1]) for i in range(3)]
    update = {name: torch.stack([single.update[name] for single in singles]) for name in singles[0].update}
    together = Observation(1, 0, singles[0].parameters, update, LocalTraining("gradient", 3, 1, per_sample=True))
    layer = find_last_layer(knowing(model))
    batch = last_layer_gradients([observe(model, images, labels)], layer)
    torch.testing.assert_close(last_layer_gradients([together], layer).weight, batch.weight)


@pytest.mark.parametrize(("value", "words"), [(0.0, "is zero"), (float("nan"), "NaN"), (float("-inf"), "infinity")])
def test_unusable_updates_are_refused_by_name(observe, lenet, knowing, value, words):
    model = lenet(0)
    observation = observe(model, torch.rand(2, 1, 12, 12), torch.tensor([2, 7]), client=5, round=3)
    for name in ("fc.weight", "fc.bias"):
        observation.update[name].fill_(value)
    with pytest.raises(UsageError, match=rf"client 5 in round 3.*{words}"):
        Version1().infer([observation], knowing(model), Run())


def test_an_update_of_another_model_is_refused(observe, lenet, knowing):
    observation = observe(lenet(0), torch.rand(2, 1, 12, 12), torch.tensor([2, 7]))
    with pytest.raises(UsageError, match=r"no tensor named 'my_head\.weight'"):
        Version1().infer([observation], knowing(Backwards()), Run())
