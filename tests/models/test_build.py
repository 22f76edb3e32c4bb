import random
from typing import NamedTuple

import pytest
import torch
from torch import nn

from fedleak.errors import UsageError
from fedleak.instantiate import Part
from fedleak.local_update import local_update
from fedleak.models import LeNet, Normalize, RepeatChannels
from fedleak.models import build_model as build_part
from fedleak.training import LocalTraining

GREY, COLOUR = (1, 28, 28), (3, 32, 32)
LENET = {"_target_": "fedleak.models.LeNet", "init": "uniform", "normalize": None}
RESNET = {"_target_": "torchvision.models.resnet18"}


class Linear(nn.Module):
    """What a user writes in a file of their own: torchvision's argument name, no image shape."""

    def __init__(self, num_classes: int, bias: bool = True, widths: object = None) -> None:
        super().__init__()
        self.widths = widths
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes, bias=bias))
        self.net(torch.zeros(1, 784))

    def forward(self, images):
        return self.net(images)


class ThreeChannels(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 28)
        self.fc = nn.Linear(2, classes)

    def forward(self, images):
        assert images.shape[1] == 3
        return self.fc(self.conv(images).flatten(1))


class BatchNormed(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(784, classes))

    def forward(self, images):
        return self.net(images)


class Several(nn.Module):
    """Returns what `kind` makes of the logits and something else, in train mode alone."""

    def __init__(self, classes: int, kind: str) -> None:
        super().__init__()
        self.fc, self.other, self.kind = nn.Linear(784, classes), nn.Linear(784, 3), kind

    def forward(self, images):
        logits, other = self.fc(images.flatten(1)), self.other(images.flatten(1))
        if not self.training:
            return logits
        return {"tuple": (logits, other), "dict": {"loss": other, "logits": logits}, "object": Output(other, logits)}[
            self.kind
        ]


class Output(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor


class Nothing(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(784, classes)

    def forward(self, images):
        return None


def fails(**kwargs: object) -> nn.Module:
    raise RuntimeError("no such size\nsecond line")


def config(cls: type | object, **kwargs: object) -> dict[str, object]:
    return {"_target_": f"{__name__}.{cls.__name__}", **kwargs}  # type: ignore[attr-defined]


def build_model(node: dict, *args, seed: int) -> nn.Module:
    return build_part(Part("model", node), *args, seed)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("init", ["uniform", "default"])
def test_the_seed_decides_the_weights_and_the_global_state_is_untouched(init):
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state()
    first = build_model(LENET | {"init": init}, GREY, 10, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second = build_model(LENET | {"init": init}, GREY, 10, seed=1)
    other = build_model(LENET | {"init": init}, GREY, 10, seed=2)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(other))


def test_a_model_that_needs_no_layers_before_it_is_returned_itself():
    model = build_model(LENET, COLOUR, 100, seed=0)
    assert isinstance(model, LeNet)
    assert model.training
    assert model.fc.out_features == 100


def test_lists_arrive_as_lists():
    model = build_model(config(Linear, bias=False, widths=[1, [2]]), GREY, 4, seed=0)
    assert type(model.widths) is list
    assert model.widths == [1, [2]]
    assert model.net[1].bias is None
    assert model.net[1].out_features == 4


def test_normalize_is_the_first_layer():
    plain = build_model(LENET, GREY, 10, seed=0)
    model = build_model(LENET | {"normalize": {"mean": [0.1307], "std": [0.3081]}}, GREY, 10, seed=0)
    images = torch.rand(2, *GREY)
    assert torch.allclose(model(images), plain((images - 0.1307) / 0.3081), atol=1e-6)
    assert torch.equal(weights(plain), weights(model))


def test_one_channel_images_are_repeated_for_a_three_channel_model():
    model = build_model(config(ThreeChannels, normalize={"mean": [0.5, 0.4, 0.3], "std": [1, 1, 1]}), GREY, 10, seed=0)
    assert [type(layer) for layer in list(model.children())[:2]] == [RepeatChannels, Normalize]
    assert model(torch.rand(2, *GREY)).shape == (2, 10)
    plain = build_model(config(ThreeChannels), (3, 28, 28), 10, seed=0)
    assert isinstance(plain, ThreeChannels)


def test_a_torchvision_model_by_its_import_path():
    model = build_model(RESNET, GREY, 7, seed=0)
    assert model.eval()(torch.rand(1, *GREY)).shape == (1, 7)


def test_the_check_does_not_move_buffers():
    model = build_model(config(BatchNormed), GREY, 10, seed=0)
    norm = model.net[0]
    assert int(norm.num_batches_tracked) == 0
    assert torch.equal(norm.running_mean, torch.zeros(1))
    assert torch.equal(norm.running_var, torch.ones(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"^model\._target_=None is no import path"),
        ({"_target_": "LeNet"}, r"^model\._target_=LeNet is no import path"),
        ({"_target_": "no_such_package.Net"}, r"^model\._target_=no_such_package\.Net: no module named"),
        ({"_target_": "fedleak.models.LeNot"}, r"no LeNot in fedleak\.models"),
        ({"_target_": "fedleak.lenet.LeNet"}, r"no lenet in fedleak"),
        ({"_target_": "math.pi"}, r"is a float, not a class"),
        ({"_target_": "builtins.dict"}, r"gave a dict; it must give a torch\.nn\.Module"),
        ({"_target_": "torch.nn.ReLU"}, r"gives \[2, 1, 28, 28\] .*logits \[2, 10\]"),
        (LENET | {"init": "xavier"}, r"^model\.init=xavier"),
        (LENET | {"hiden": 3}, r"^model\.hiden=3 is no argument of fedleak\.models\.LeNet; it takes"),
        (LENET | {"normalize": 0.5}, r"^model\.normalize=0\.5"),
        (LENET | {"normalize": {"mean": [0.5]}}, r"^model\.normalize="),
        (LENET | {"normalize": {"mean": [0, 0], "std": [1, 1]}}, r"^model\.normalize .*2 channels and the images 1"),
        (LENET | {"normalize": {"mean": [0], "std": [0]}}, r"^model\.normalize .*above 0"),
        (RESNET | {"wdth": 3}, r"resnet18 could not be built: TypeError.*wdth"),
        ({"_target_": f"{__name__}.fails"}, r"could not be built: RuntimeError: no such size$"),
        ({"_target_": f"{__name__}.Nothing"}, r"gives NoneType for a batch of 2"),
        ({"_target_": f"{__name__}.Linear"} | {"num_classes": 3}, r"gives \[2, 3\] .*logits \[2, 10\]"),
    ],
)
def test_bad_configs_are_one_clear_line(settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        build_model(settings, GREY, 10, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["tuple", "dict", "object"])
def test_of_several_outputs_the_logits_train_the_model(kind):
    model = build_model(config(Several, kind=kind), GREY, 10, seed=0)
    images, labels = torch.rand(2, *GREY), torch.tensor([1, 2])
    logits = model(images)
    assert torch.equal(logits, model.eval()(images))
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    update = local_update(model, parameters, {}, images, labels, LocalTraining(batch_size=2, local_steps=1)).update
    assert update["model.fc.weight"].abs().sum() > 0
    assert update["model.other.weight"].abs().sum() == 0  # an auxiliary output trains nothing


def test_images_that_the_model_cannot_take_are_named():
    with pytest.raises(UsageError, match=r"fails on images of 3×32×32: .*data\.image_size"):
        build_model(config(Linear), COLOUR, 10, seed=0)


def test_a_broken_file_is_named_with_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "broken_model.py").write_text("import no_such_dependency\n")
    (tmp_path / "faulty_model.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="no_such_dependency"):
        build_model({"_target_": "broken_model.Net"}, GREY, 10, seed=0)
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        build_model({"_target_": "faulty_model.Net"}, GREY, 10, seed=0)
