import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedleak.defenses import Pruning
from fedleak.errors import UsageError


def prune(ratio, **update):
    return Pruning(ratio).apply(update, generator=torch.Generator())


@given(
    ratio=st.integers(0, 99).map(lambda percent: percent / 100),
    shape=st.lists(st.integers(1, 7), min_size=0, max_size=4),
    seed=st.integers(0, 1000),
)
def test_exactly_the_smallest_fraction_is_zeroed(ratio, shape, seed):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    after = prune(ratio, value=value)["value"]
    count = round(ratio * 100) * value.numel() // 100
    zeroed = after == 0
    assert int(zeroed.sum()) == count
    assert torch.equal(after[~zeroed], value[~zeroed])
    if count > 0:
        assert value[zeroed].abs().max() <= value[~zeroed].abs().min()


def test_ties_do_not_prune_more_than_asked():
    after = prune(0.5, value=torch.tensor([1.0, -1, 1, -1, 1, -1]))["value"]
    assert after.tolist() == [0, 0, 0, -1, 1, -1]


def test_zeros_count_among_the_smallest():
    after = prune(0.5, value=torch.tensor([0.0, 3, 0, 2]))["value"]
    assert after.tolist() == [0, 3, 0, 2]


def test_every_tensor_is_pruned_by_itself():
    after = prune(0.75, large=torch.tensor([[10.0, 20], [30, 40]]), small=torch.tensor([0.1, -0.4, 0.2, 0.3]))
    assert after["large"].tolist() == [[0, 0], [0, 40]]
    assert after["small"].tolist() == pytest.approx([0, -0.4, 0, 0])


def test_something_is_left_of_every_tensor():
    assert prune(0.999, bias=torch.ones(10))["bias"].count_nonzero() == 1


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, math.nan, "half", None, True])
def test_a_ratio_outside_the_unit_interval_is_refused(ratio):
    with pytest.raises(UsageError, match=rf"^defense\.ratio={ratio} .*give"):
        Pruning(ratio)
