"""Every model of ``conf/model`` with every activation, normalisation and pooling: built, and trained one step."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from fedleak.attacks.functional import functional_copy, mean_gradient
from fedleak.errors import UsageError
from fedleak.instantiate import Part
from fedleak.local_update import local_update
from fedleak.models import CNN, ConvNet, ResNet20, ViT, build_model
from fedleak.models.check import check_training, hidden_draws
from fedleak.models.parts import EveryOther, pool, replace_modules
from fedleak.training import LocalTraining

CONF = Path(__file__).parents[2] / "conf" / "model"
ACTIVATIONS = ("relu", "sigmoid", "tanh", "gelu", "leaky_relu")
NORMS = ("batch", "group", "layer", "none")
SMALL: dict[str, dict[str, Any]] = {
    "cnn": {},
    "convnet": {"width": 8},
    "resnet20": {"width": 4, "blocks": 1},
    "vit": {"width": 12, "depth": 2},
    "resnet18": {},
    "densenet121": {},
    "inception_v3": {},
    "vgg11": {"hidden": [8]},
}
SIZES = {"inception_v3": 75, "vit": 28}
COVER = list(
    zip(
        ACTIVATIONS,
        ("batch", "group", "layer", "none", "batch"),
        ("max", "average", "stride", "max", "average"),
        strict=True,
    )
)
LARGE = ("resnet18", "densenet121", "inception_v3", "vgg11")


def build(name: str, size: int | None = None, **settings: object) -> tuple[nn.Module, tuple[int, int, int]]:
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text()) | SMALL[name] | settings
    size = size or SIZES.get(name, 32)
    shape = (1 if name in ("cnn", "resnet18") else 3, size, size)
    return build_model(Part("model", node), shape, 5, 0), shape


def one_step(name: str, **settings: object) -> None:
    model, shape = build(name, **settings)
    start = {n: p.detach() for n, p in model.named_parameters()}
    buffers = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    found = local_update(
        model, start, buffers, torch.rand(2, *shape), torch.tensor([1, 3]), LocalTraining(batch_size=2, local_steps=1)
    )
    assert set(found.update) == set(start)
    assert all(value.isfinite().all() for value in found.update.values())
    assert next(iter(found.update.values())).abs().sum() > 0  # down to the first layer
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bool(norms) == (settings["norm"] == "batch")


def cases(names, combinations):
    return [pytest.param(n, *c, id="-".join([n, *c])) for n in names for c in combinations]


@pytest.mark.parametrize(
    ("name", "activation", "norm", "pool"),
    cases([n for n in SMALL if n not in LARGE], COVER) + cases(LARGE, COVER[1:3]),
)
def test_a_model_trains_a_step(name, activation, norm, pool):
    one_step(name, activation=activation, norm=norm, pool=pool)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", SMALL)
def test_every_combination_trains_a_step(name, activation, norm):
    one_step(name, activation=activation, norm=norm, pool="max")


@pytest.mark.parametrize("name", [n for n in SMALL if n not in LARGE])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_attacker_differentiates_what_the_client_did(name, norm):
    model, shape = build(name, norm=norm)
    start = {n: p.detach().double() for n, p in model.named_parameters()}
    buffers = {n: b.double() for n, b in model.named_buffers() if b.is_floating_point()}
    images, labels = torch.rand(3, *shape, dtype=torch.float64), torch.tensor([1, 3, 0])
    sent = local_update(model.double(), start, buffers, images, labels, LocalTraining(batch_size=3, local_steps=1))
    hot = nn.functional.one_hot(labels, 5).double()
    found = mean_gradient(functional_copy(model, True), start, buffers, images.requires_grad_(), hot)
    assert all(torch.allclose(found[n], sent.update[n], atol=1e-10) for n in start)
    torch.autograd.grad(sum(v.square().sum() for v in found.values()), images)  # twice, without a complaint


def test_shapes_of_the_published_networks():
    def count(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    assert count(CNN((1, 28, 28), 10)) == 44426  # Flower's tutorial network, for one channel of 28
    assert count(ConvNet((3, 32, 32), 10)) == 2904970  # as Inverting Gradients states it
    assert 268000 < count(ResNet20((3, 32, 32), 10)) < 271000  # .27 million in He 2016
    assert CNN((1, 28, 28), 10, channels=(32, 64), hidden=(512,)).body(torch.rand(1, 1, 28, 28)).shape == (1, 1024)


def test_pooling_that_takes_one_pixel_keeps_the_shape_of_maximum_pooling():
    for size, stride, padding in [(2, 2, 0), (3, 2, 1), (3, 2, 0), (3, 3, 0)]:
        for side in (7, 8, 35):
            maps = torch.rand(1, 2, side, side)
            chosen, largest = (pool(name, size, stride, padding)(maps) for name in ("stride", "max"))
            assert chosen.shape == largest.shape
            assert (chosen <= largest).all()  # it is a pixel of the same window
    assert torch.equal(EveryOther(1, 2)(torch.arange(16.0).view(1, 1, 4, 4)).flatten(), torch.tensor([0.0, 2, 8, 10]))


def test_bad_switches_are_refused_by_name():
    for make, key in [
        (lambda: CNN(pool="min"), "pool"),
        (lambda: CNN(channels=[0]), "channels"),
        (lambda: ConvNet(norm="instance"), "norm"),
        (lambda: ResNet20(activation="step"), "activation"),
        (lambda: ViT((1, 28, 28), patch=5), "patch"),
        (lambda: ViT(width=10), "width"),
    ]:
        with pytest.raises(UsageError, match=rf"^model\.{key}="):
            make()
    with pytest.raises(UsageError, match=r"^model=cnn: .*data\.image_size"):
        CNN((1, 8, 8))
    with pytest.raises(UsageError, match=r"^model\.stem=big"):
        build("resnet18", stem="big")


def test_the_small_stem_keeps_the_map():
    model, _ = build("resnet18", stem="small")
    network = model.get_submodule("model")
    assert network.maxpool(network.conv1(torch.rand(1, 3, 32, 32))).shape == (1, 64, 32, 32)


@pytest.mark.slow
def test_inception_with_its_auxiliary_classifier_gives_the_main_logits():
    model, shape = build("inception_v3", size=299, aux_logits=True, norm="none")
    assert any("AuxLogits" in name for name, _ in model.named_parameters())
    assert model.train()(torch.rand(1, *shape)).shape == (1, 5)


def test_batch_norm_of_a_single_number_is_refused_before_anything_runs():
    model, shape = build("resnet18")
    check_training(model, shape, 2, training_mode=True)
    check_training(model, shape, 1, training_mode=False)
    with pytest.raises(UsageError, match=r"^federation\.batch_size=1: .*federation\.training_mode=false"):
        check_training(model, shape, 1, training_mode=True)
    check_training(*build("convnet"), 1, training_mode=True)  # sixteen numbers a channel are enough


def test_dropout_is_warned_of():
    model, _ = build("vgg11", dropout=0.5)
    assert "model.dropout=0" in str(hidden_draws(model, True))
    assert hidden_draws(model, False) is None
    assert hidden_draws(build("vgg11")[0], True) is None


def test_replacing_goes_all_the_way_down():
    network = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    replace_modules(network, lambda m: nn.Tanh() if isinstance(m, nn.ReLU) else None)
    assert [type(m) for m in network.modules() if not list(m.children())] == [nn.Tanh, nn.Tanh, nn.Linear]
