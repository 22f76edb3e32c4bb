"""What a Gaussian mechanism costs in (ε, δ): Rényi differential privacy of the subsampled mechanism, step by step."""

from __future__ import annotations

import math

import numpy as np

ORDERS = [1 + x / 10 for x in range(1, 100)] + [float(x) for x in range(12, 64)]
"""Rényi orders that are tried; those of opacus, so that the figures are comparable."""
_POINTS = 20_001


def gaussian_epsilon(*, noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """ε of `steps` releases of a sum of clipped contributions with Gaussian noise, each sampled at random.

    Args:
        noise_multiplier: standard deviation of the noise over the clipping norm; 0 gives an infinite ε.
        sample_rate: the probability that an example takes part in a step (Poisson sampling is assumed).
        steps: releases.
        delta: the δ of (ε, δ).

    References:
        Mironov, Talwar, Zhang. Rényi differential privacy of the sampled Gaussian mechanism. 2019.
        Balle, Barthe, Gaboardi, Hsu, Sato. Hypothesis testing interpretations and Rényi differential privacy. 2020, for
        the step from Rényi's divergence to (ε, δ).
    """
    if steps == 0 or sample_rate == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    best = math.inf
    for order in ORDERS:
        divergence = steps * _divergence(noise_multiplier, min(1.0, sample_rate), order)
        epsilon = divergence - (math.log(delta) + math.log(order)) / (order - 1) + math.log1p(-1 / order)
        best = min(best, epsilon)
    return max(0.0, best)


def _divergence(sigma: float, rate: float, order: float) -> float:
    """Rényi divergence of a given order of one release, by the trapezoidal rule in the noise's own units."""
    if rate == 1:
        return order / (2 * sigma**2)
    z = np.linspace(-14 * sigma, order + 14 * sigma, _POINTS)
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * sigma**2))
    exponent = order * ratio - z**2 / (2 * sigma**2)
    top = float(exponent.max())
    mass = float(np.trapezoid(np.exp(exponent - top), z)) / (sigma * math.sqrt(2 * math.pi))
    return max(0.0, (top + math.log(mass)) / (order - 1))
