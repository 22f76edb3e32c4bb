"""What a Gaussian mechanism promises: (ε, δ) by Rényi differential privacy, and how surely nobody can reconstruct."""

from __future__ import annotations

import math
from statistics import NormalDist

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


def reconstruction_bound(*, noise_multiplier: float, sample_rate: float, steps: int, guess: float) -> float:
    """The most that the probability of reconstructing one example can be, whatever the attacker knows and does.

    The attacker knows all other examples and every release. The less of two bounds: Rényi's, min over orders of
    (guess · e^ε)^((order − 1) / order), which counts the sampling; and that of the Gaussian mechanism as if the example
    took part in every release, Φ(Φ⁻¹(guess) + √steps / noise multiplier).

    Args:
        noise_multiplier, sample_rate, steps: as for `gaussian_epsilon`.
        guess: the probability of the same without any release: 0.1 where the example is one of ten that the attacker
            holds, as likely as each other.

    References:
        Balle, Cherubin, Hayes. Reconstructing training data with informed adversaries. S&P 2022, theorem 2.
        Hayes, Mahloujifar, Balle. Bounding training data reconstruction in DP-SGD. NeurIPS 2023.
    """
    if steps == 0 or sample_rate == 0:
        return guess
    if noise_multiplier == 0:
        return 1.0
    normal = NormalDist()
    best = normal.cdf(normal.inv_cdf(guess) + math.sqrt(steps) / noise_multiplier)
    for order in ORDERS:
        divergence = steps * _divergence(noise_multiplier, min(1.0, sample_rate), order)
        best = min(best, math.exp(min(0.0, (math.log(guess) + divergence) * (order - 1) / order)))
    return best


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
