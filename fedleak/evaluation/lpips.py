"""LPIPS: the distance of two images in the eyes of a network that was trained on natural ones; weights are the user's.

Nothing is ever downloaded. AlexNet's weights are torchvision's ``alexnet*.pth``; those of the metric come with the
packages torchmetrics and lpips, as ``alex.pth``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedleak.errors import UsageError

_LAYERS = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))
"""AlexNet's convolutions: place among torchvision's features, stride, padding, whether maximum pooling goes before."""
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_LEAST = 64
"""Height and width that smaller images are enlarged to."""


class LPIPS:
    """The distance of pairs of images, 0 for equal ones: version 0.1 with AlexNet.

    Images that are smaller than 64 pixels are enlarged to 64 first, grey ones take the place of all three colours; what
    comes out of digits is no more than a hint, since the network knows photographs.

    Args:
        backbone: torchvision's state of AlexNet.
        linear: the metric's own, ``lin0.model.1.weight`` ``[1, C, 1, 1]`` to ``lin4…``.

    References:
        Zhang, Isola, Efros, Shechtman, Wang. The unreasonable effectiveness of deep features as a perceptual metric.
        CVPR 2018.
    """

    def __init__(self, backbone: Mapping[str, Tensor], linear: Mapping[str, Tensor]) -> None:
        self.kernels = [
            (backbone[f"features.{place}.weight"].float(), backbone[f"features.{place}.bias"].float())
            for place, *_ in _LAYERS
        ]
        self.weights = [linear[f"lin{i}.model.1.weight"].float() for i in range(len(_LAYERS))]

    @torch.no_grad()
    def __call__(self, truth: Tensor, rebuilt: Tensor) -> Tensor:
        """``[B]`` float64 of two ``[B, C, H, W]`` in [0, 1], C being 1 or 3."""
        pairs = zip(self._features(truth), self._features(rebuilt), self.weights, strict=True)
        parts = [functional.conv2d((a - b).square(), weight).mean((1, 2, 3)) for a, b, weight in pairs]
        return torch.stack(parts).sum(0).double()

    def _features(self, images: Tensor) -> list[Tensor]:
        """After each convolution, every place's vector of length one."""
        x = images.float().expand(-1, 3, -1, -1)
        if min(x.shape[-2:]) < _LEAST:
            x = functional.interpolate(x, (_LEAST, _LEAST), mode="bilinear", align_corners=False)
        x = (2 * x - 1 - x.new_tensor(_SHIFT).view(3, 1, 1)) / x.new_tensor(_SCALE).view(3, 1, 1)
        found = []
        for (weight, bias), (_, stride, padding, pooled) in zip(self.kernels, _LAYERS, strict=True):
            x = functional.max_pool2d(x, 3, 2) if pooled else x
            x = functional.conv2d(x, weight, bias, stride, padding).relu()
            found.append(x / (1e-8 + x.square().sum(1, keepdim=True)).sqrt())
        return found


def load_lpips(folder: str, key: str) -> LPIPS:
    """From weights at hand.

    Args:
        folder: that holds torchvision's ``alexnet*.pth``, and ``alex.pth`` where torchmetrics is not installed.
        key: of the configuration, for error messages.

    Raises:
        UsageError: a file is missing, or holds something else.
    """
    place = Path(folder).expanduser()
    backbone = next(iter(sorted(place.glob("alexnet*.pth"))), None)
    own = place / "alex.pth"
    linear = own if own.exists() else _of_torchmetrics()
    if backbone is None or linear is None:
        missing = "alexnet*.pth (torchvision's weights)" if backbone is None else "LPIPS's alex.pth"
        raise UsageError(f"{key}={folder}: holds no {missing}; put it there, or leave {key}=null")
    try:
        states: list[Any] = [torch.load(path, map_location="cpu", weights_only=True) for path in (backbone, linear)]
        return LPIPS(*states)
    except Exception as error:
        raise UsageError(
            f"{key}={folder}: {backbone.name} or {linear.name} is damaged or another's: {error}"
        ) from error


def _of_torchmetrics() -> Path | None:
    spec = find_spec("torchmetrics")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "functional" / "image" / "lpips_models" / "alex.pth"
    return path if path.exists() else None
