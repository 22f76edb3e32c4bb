"""The interchangeable parts of networks: activations, normalisations, and ways to make a map smaller."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fedleak.errors import UsageError

ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}
NORMS = ("batch", "group", "layer", "none")
POOLS = ("max", "average", "stride")
_GROUPS = 8


def choose(key: str, value: object, choices: Mapping[str, object] | tuple[str, ...]) -> None:
    """Raise `UsageError` unless ``model.key=value`` is one of the choices."""
    if value not in choices:
        raise UsageError(f"model.{key}={value} is unknown; choose one of {', '.join(choices)}")


def activation(name: str) -> nn.Module:
    """A fresh activation by its name in `ACTIVATIONS`; raises `UsageError` for another."""
    choose("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


def norm(name: str, channels: int) -> nn.Module:
    """What normalises maps ``[B, channels, H, W]``.

    ``batch`` couples the samples of a batch in train mode and keeps buffers; ``group`` (at most 8 groups) and ``layer``
    (all of a sample's numbers at once, a scale and shift a channel) treat each sample alone; ``none`` does nothing.
    """
    choose("norm", name, NORMS)
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "none":
        return nn.Identity()
    return nn.GroupNorm(math.gcd(_GROUPS, channels) if name == "group" else 1, channels)


def pool(name: str, size: int, stride: int | None = None, padding: int = 0) -> nn.Module:
    """What makes a map smaller, its output the same size for every name.

    Args:
        name: ``max``, ``average``, or ``stride``: one pixel of each window.
        size, stride, padding: of the window, see `torch.nn.MaxPool2d`.
    """
    choose("pool", name, POOLS)
    if name == "max":
        return nn.MaxPool2d(size, stride, padding)
    if name == "average":
        return nn.AvgPool2d(size, stride, padding)
    return EveryOther(size, size if stride is None else stride, padding)


class EveryOther(nn.Module):
    """The pixel in the middle of each window of a pooling, and nothing of the others.

    Args:
        size, stride, padding: of the window.
    """

    def __init__(self, size: int, stride: int, padding: int = 0) -> None:
        super().__init__()
        self.size, self.stride, self.padding = size, stride, padding

    def forward(self, maps: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H', W']``."""
        first = self.size // 2 - self.padding
        rows, columns = ((n + 2 * self.padding - self.size) // self.stride + 1 for n in maps.shape[2:])
        maps = maps[:, :, first :: self.stride, first :: self.stride]
        return maps[:, :, :rows, :columns]

    def extra_repr(self) -> str:
        return f"size={self.size}, stride={self.stride}, padding={self.padding}"


def flat_size(body: nn.Module, image_shape: tuple[int, int, int], key: str) -> int:
    """Numbers that `body` makes of one image; raises `UsageError` where nothing is left of images of this shape."""
    was = body.training
    try:
        with torch.no_grad():
            return int(body.eval()(torch.zeros(1, *image_shape)).numel())
    except RuntimeError as error:
        size = "×".join(map(str, image_shape))
        raise UsageError(f"{key}: nothing is left of images of {size}; choose a larger data.image_size") from error
    finally:
        body.train(was)


def replace_modules(network: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """`network` with every module for which `make` gives another one replaced by that, in place."""
    for name, child in network.named_children():
        other = make(child)
        if other is None:
            replace_modules(child, make)
        else:
            setattr(network, name, other)
    return network


def widths(value: object, key: str) -> tuple[int, ...]:
    """Layer widths of a setting; raises `UsageError` unless they are whole numbers above 0."""
    listed = isinstance(value, list | tuple)
    if not listed or any(type(width) is not int or width < 1 for width in value):  # type: ignore[attr-defined]
        raise UsageError(
            f"model.{key}={value} are no layer widths; give whole numbers above 0, say [256,128], or [] for none"
        )
    return tuple(value)  # type: ignore[arg-type]
