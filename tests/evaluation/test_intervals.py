import math

import pytest

from fedleak.evaluation.intervals import normal, wilson


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
