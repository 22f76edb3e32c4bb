import math

import numpy as np
import pytest

from fedleak.evaluation.intervals import normal, of_median, wilson


def test_wilson_against_published_values():
    low, high = wilson(0.5, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    assert wilson(1.0, 100)[1] == pytest.approx(1.0)
    assert wilson(0.0, 10)[0] == pytest.approx(0.0)


def test_normal_is_the_mean_and_its_standard_errors():
    low, high = normal([0.0, 1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(1.5)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(5 / 3) / 2)
    assert all(math.isnan(bound) for bound in normal([1.0]))


def test_the_interval_of_a_median_holds_it_as_often_as_promised():
    assert of_median(range(1, 11)) == (2, 9)  # the textbook's ranks for ten values
    assert of_median([5, 1, 4, 2, 3, 6]) == (1, 6)
    assert of_median([1.0, 2.0, 3.0, 4.0, 5.0, math.inf])[1] == math.inf
    assert all(math.isnan(bound) for bound in of_median(range(5)))
    rng = np.random.default_rng(0)
    for count in (6, 17, 40):
        bounds = [of_median(rng.normal(size=count)) for _ in range(2000)]
        assert np.mean([low <= 0 <= high for low, high in bounds]) > 0.94
