"""Made-up images: clouds with a natural image's spectrum, and strokes."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.seeding import plain_generator


def made_up_images(kinds: int, size: int, shape: tuple[int, int, int], seed: int, *, varied: bool = False) -> Tensor:
    """``[kinds, size, C, H, W]`` in [0, 1]: clouds with a natural image's spectrum, of many levels and contrasts; every
    fourth kind is of bright strokes on dark.

    Args:
        kinds, size: how many, and images of each.
        shape: (C, H, W).
        seed: decides them.
        varied: every other kind's images have some of their shape in common, as aligned faces have, and half of the
            strokes lie in the middle, as digits do.
    """
    generator = plain_generator(seed)
    channels, height, width = shape

    def normal(*of: int) -> Tensor:
        return torch.randn(*of, generator=generator)

    def uniform() -> float:
        return float(torch.rand(1, generator=generator))

    across, down = torch.fft.rfftfreq(width)[None], torch.fft.fftfreq(height)[:, None]
    frequency = (across**2 + down**2).sqrt().clamp(min=1 / max(height, width))
    middle = _distance(height, width)

    def clouds(many: int, count: int, steep: float) -> Tensor:
        drawn = torch.fft.irfft2(
            torch.fft.rfft2(normal(many, count, height, width)) / frequency**steep, s=(height, width)
        )
        return _standard(drawn - drawn.mean(dim=(2, 3), keepdim=True))

    def shades(many: int, steep: float) -> Tensor:
        shade = clouds(many, 1, steep)
        return shade if channels == 1 else _standard(shade + 0.35 * clouds(many, channels, steep))

    made = []
    for kind in range(kinds):
        steep = 0.6 + 1.4 * uniform()
        shade = shades(size, steep)
        if varied and kind % 2:
            common = 0.9 * uniform()
            shade = _standard(common * shades(1, 1 + uniform()) + (1 - common) * shade)
        level = 0.25 + 0.45 * uniform() + 0.12 * normal(size, 1, 1, 1) + 0.06 * normal(size, channels, 1, 1)
        contrast = (0.13 + 0.2 * uniform()) * (1 + 0.3 * normal(size, 1, 1, 1)).clamp(0.3, 2)
        images = level + contrast * shade
        if kind % 4 == 3:
            sharp, least = (6 + 24 * uniform(), 0.72 + 0.1 * uniform()) if varied else (8.0, 0.8)
            if varied and kind % 8 == 7:
                shade = shade - 3 * torch.sigmoid(12 * (middle - 0.55 - 0.4 * uniform()))
            edge = torch.quantile(shade.flatten(1), least + 0.12 * uniform(), dim=1)[:, None, None, None]
            images = torch.sigmoid(sharp * (shade - edge))
        made.append(images.clamp(0, 1))
    return torch.stack(made)


def _distance(height: int, width: int) -> Tensor:
    """``[H, W]``, of each pixel from the middle, 1 at the sides."""
    down, across = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)[None]
    return (down**2 + across**2).sqrt()


def _standard(images: Tensor) -> Tensor:
    return images / images.flatten(1).std(dim=1)[:, None, None, None]
