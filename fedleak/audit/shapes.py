"""What a model tells of its images and classes, and what images tell of their normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedleak.errors import UsageError

SIZES = (28, 32, 64, 224, 96, 14, 16, 8, 48, 128, 112, 256, 299)
"""Sides of images that models are made for, the most usual first."""
NORMALIZATIONS: tuple[tuple[list[float], list[float]], ...] = (
    ([0.0], [1.0]),
    ([0.1307], [0.3081]),
    ([0.286], [0.353]),
    ([0.5], [0.5]),
    ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
)
"""The usual ones."""


def infer_shape(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the images that a model takes.

    Raises:
        UsageError: no usual square image goes through it.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    for channels in (first.in_channels,) if first is not None else (1, 3):
        for size in SIZES:
            if _takes(model, (channels, size, size)) is not None:
                return channels, size, size
    raise UsageError("--image-shape: the model does not tell it; give C,H,W, such as 3,32,32")


def infer_classes(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """How many logits a model gives.

    Raises:
        UsageError: it does not take such images, or gives no row of logits for each.
    """
    classes = _takes(model, shape)
    if classes is None:
        raise UsageError(f"--image-shape={','.join(map(str, shape))}: the model does not take such images; give others")
    return classes


def _takes(model: nn.Module, shape: tuple[int, int, int]) -> int | None:
    """Logits that the model gives for one grey image; None if it takes none of that shape."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            logits = model(torch.full((1, *shape), 0.5))
    except Exception:  # whatever a stranger's forward does with what it does not expect
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode
    return logits.shape[1] if isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == 1 else None


def guess_normalization(images: Sequence[Tensor]) -> tuple[list[float], list[float]]:
    """The usual (mean, std) that took images in [0, 1] to these: the tightest whose range holds them.

    Args:
        images: normalised, ``[B, C, H, W]`` each, of an app that was watched.
    """
    if not images:
        return [0.0], [1.0]
    channels = images[0].shape[1]
    lows = torch.stack([i.amin(dim=(0, 2, 3)) for i in images]).amin(dim=0)
    highs = torch.stack([i.amax(dim=(0, 2, 3)) for i in images]).amax(dim=0)
    best, width = ([0.0], [1.0]), float("inf")
    for mean, std in NORMALIZATIONS:
        if len(mean) not in (1, channels):
            continue
        m, s = torch.tensor(mean), torch.tensor(std)
        low, high = -m / s, (1 - m) / s
        if (lows >= low - 1e-3).all() and (highs <= high + 1e-3).all() and float((high - low).max()) < width:
            best, width = (mean, std), float((high - low).max())
    return best
