import math

import pytest
import torch

from fedleak.defenses import Gaussian, Laplacian
from fedleak.errors import UsageError

COUNT = 200_000


def noise(defense, seed=0):
    zeros = {"weight": torch.zeros(COUNT // 100, 100)}
    return defense.apply(zeros, generator=torch.Generator().manual_seed(seed))["weight"].flatten()


@pytest.mark.parametrize("std", [1e-4, 0.1, 3.0])
def test_gaussian_noise_has_the_moments_of_a_normal(std):
    sample = noise(Gaussian(std)) / std
    # Five standard errors of each statistic: false alarms are one in a million, and the seed is fixed.
    assert abs(sample.mean()) < 5 / math.sqrt(COUNT)
    assert abs(sample.var() - 1) < 5 * math.sqrt(2 / COUNT)
    assert abs((sample**4).mean() - 3) < 5 * math.sqrt(96 / COUNT)


@pytest.mark.parametrize("scale", [1e-4, 0.1, 3.0])
def test_laplacian_noise_has_the_moments_of_a_laplacian(scale):
    sample = noise(Laplacian(scale)) / scale
    assert abs(sample.mean()) < 5 * math.sqrt(2 / COUNT)
    assert abs(sample.abs().mean() - 1) < 5 / math.sqrt(COUNT)
    assert abs(sample.var() - 2) < 5 * math.sqrt(20 / COUNT)
    # An exponential magnitude: P(|x| > 3) is e^-3, where a normal of the same variance has 0.034.
    assert abs((sample.abs() > 3).float().mean() - math.exp(-3)) < 5 * math.sqrt(0.05 / COUNT)


@pytest.mark.parametrize("defense", [Gaussian(0.1), Laplacian(0.1)])
def test_elements_and_seeds_are_independent(defense):
    first, second = noise(defense, 0), noise(defense, 1)
    for a, b in [(first, second), (first[:-1], first[1:])]:
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("defense", [Gaussian(0.1), Laplacian(0.1)])
def test_noise_is_added_to_the_update(defense):
    given = {"weight": torch.full((COUNT // 100, 100), 5.0)}
    after = defense.apply(given, generator=torch.Generator().manual_seed(0))["weight"].flatten()
    assert torch.allclose(after - 5, noise(defense), atol=1e-6)


@pytest.mark.parametrize("defense", [Gaussian(0.1), Laplacian(0.1)])
def test_half_precision_gets_noise_and_counters_none(defense):
    given = {"half": torch.zeros(100, dtype=torch.float16), "count": torch.tensor(3)}
    after = defense.apply(given, generator=torch.Generator().manual_seed(0))
    assert after["half"].dtype == torch.float16
    assert after["half"].count_nonzero() > 90
    assert after["half"].isfinite().all()
    assert after["count"] == 3


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "much", None, True])
def test_an_impossible_strength_is_refused(value):
    with pytest.raises(UsageError, match=rf"^defense\.std={value} .*give"):
        Gaussian(value)
    with pytest.raises(UsageError, match=rf"^defense\.scale={value} .*give"):
        Laplacian(value)
