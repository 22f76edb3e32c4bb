"""torchvision's networks with switches for activation, normalisation and pooling.

Weights are fresh, drawn as torchvision draws them. Replacing a part changes neither the others' shapes nor their draws.
torchvision is imported here and nowhere else in the package's models, since that takes a second.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torchvision.models as zoo
from torch import Tensor, nn
from torchvision.models.inception import BasicConv2d, InceptionB, InceptionD
from torchvision.models.vgg import cfgs, make_layers

from fedleak.models.parts import activation as activation_of
from fedleak.models.parts import choose, flat_size, replace_modules, widths
from fedleak.models.parts import norm as norm_of
from fedleak.models.parts import pool as pool_of


def resnet18(
    num_classes: int = 1000,
    *,
    activation: str = "relu",
    norm: str = "batch",
    pool: str = "max",
    stem: str = "imagenet",
) -> nn.Module:
    """ResNet-18 (He 2016).

    Args:
        num_classes: number of classes.
        activation, norm, pool: see `fedleak.models.parts`; pooling is the stem's.
        stem: ``imagenet`` (7×7 at stride 2, then pooling), or ``small`` for images of 32: 3×3 at stride 1, no pooling.
    """
    choose("stem", stem, ("imagenet", "small"))
    network = zoo.resnet18(weights=None, num_classes=num_classes)
    if stem == "small":
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return _switched(network, activation, norm, pool)


def densenet121(
    num_classes: int = 1000, *, activation: str = "relu", norm: str = "batch", pool: str = "max"
) -> nn.Module:
    """DenseNet-121 (Huang 2017); `pool` is the stem's, transitions average as published."""
    network = zoo.densenet121(weights=None, num_classes=num_classes)
    network.features.add_module("activation5", activation_of(activation))  # a function in torchvision's forward
    head = [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("classifier", network.classifier)]
    whole = nn.Sequential(OrderedDict([("features", network.features), *head]))
    return _switched(whole, activation, norm, pool)


def inception_v3(
    num_classes: int = 1000,
    *,
    activation: str = "relu",
    norm: str = "batch",
    pool: str = "max",
    dropout: float = 0.0,
    aux_logits: bool = False,
) -> nn.Module:
    """Inception v3 (Szegedy 2016), for images of 299, of 75 at least.

    Args:
        num_classes: number of classes.
        activation, norm, pool: see `fedleak.models.parts`; branches that average go on doing so where `pool` is max.
        dropout: before the last layer; torchvision has 0.5. An attacker cannot know what it dropped.
        aux_logits: whether to have the second classifier, whose output training ignores.
    """
    network = zoo.inception_v3(
        weights=None, num_classes=num_classes, dropout=dropout, aux_logits=aux_logits, init_weights=False
    )

    def named(module: nn.Module) -> nn.Module | None:
        """torchvision calls these activations and poolings as functions."""
        if isinstance(module, BasicConv2d):
            return nn.Sequential(OrderedDict(conv=module.conv, bn=module.bn, activation=nn.ReLU()))
        if isinstance(module, InceptionB | InceptionD):
            replace_modules(module, named)
            parts = dict(module.named_children())
            single = [part for name, part in parts.items() if name in ("branch3x3", "branch3x3_1", "branch3x3_2")]
            double = [part for part in parts.values() if part not in single]
            return _Reduction(nn.Sequential(*single), nn.Sequential(*double))
        return None

    return _switched(replace_modules(network, named), activation, norm, pool)


def vgg11(
    image_shape: tuple[int, int, int],
    classes: int = 1000,
    *,
    hidden: list[int] | tuple[int, ...] = (4096, 4096),
    activation: str = "relu",
    norm: str = "none",
    pool: str = "max",
    dropout: float = 0.0,
) -> nn.Module:
    """VGG-11 (Simonyan 2015): torchvision's features, and a head as wide as asked for.

    Args:
        image_shape: (C, H, W), 32×32 at least; the head reads what is left of it, 7×7 maps of 224×224 images.
        classes: number of classes.
        hidden: width of the head's hidden layers.
        activation, norm, pool: see `fedleak.models.parts`.
        dropout: after each hidden layer; published is 0.5. An attacker cannot know what it dropped.
    """
    features = make_layers(cfgs["A"], batch_norm=norm != "none")
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    size = flat_size(features, (3, *image_shape[1:]), "model=vgg11")
    head: list[nn.Module] = []
    for wanted in widths(hidden, "hidden"):
        head += [_linear(size, wanted), nn.ReLU(), nn.Dropout(dropout)]
        size = wanted
    network = nn.Sequential(
        OrderedDict(features=features, flatten=nn.Flatten(), head=nn.Sequential(*head), fc=_linear(size, classes))
    )
    return _switched(network, activation, norm, pool)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """As torchvision initialises VGG's."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, 0, 0.01)
    nn.init.zeros_(layer.bias)
    return layer


def _switched(network: nn.Module, activation: str, norm: str, pool: str) -> nn.Module:
    """A network of ReLUs, BatchNorms and max pooling with others in their places."""
    activation_of(activation), norm_of(norm, 1), pool_of(pool, 2)  # refused whether the network has such or not

    def make(module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.ReLU):
            return activation_of(activation)
        if isinstance(module, nn.BatchNorm2d) and norm != "batch":
            return norm_of(norm, module.num_features)
        if isinstance(module, nn.MaxPool2d) and pool != "max":
            size, stride, padding = (int(v) for v in (module.kernel_size, module.stride, module.padding))  # type: ignore[arg-type]
            return pool_of(pool, size, stride, padding)
        return None

    return replace_modules(network, make)


class _Reduction(nn.Module):
    """Branches beside a pooling, one after the other in the channels (Inception's B and D)."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.pool = nn.MaxPool2d(3, 2)

    def forward(self, a: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C', H', W']``."""
        return torch.cat([*(branch(a) for branch in self.branches), self.pool(a)], 1)
