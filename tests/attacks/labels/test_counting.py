import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedleak.attacks.labels.counting import Counts, fill, guesses_from, label_total, round_counts
from fedleak.capture import Observation
from fedleak.errors import UsageError
from fedleak.training import LocalTraining

VALUES = st.integers(1, 6).flatmap(lambda c: st.lists(st.floats(-3, 3, width=32), min_size=c, max_size=c))


def slow_fill(counts, values, step, total):
    counts, values = list(counts), [float(v) for v in values]
    while sum(counts) < total:
        smallest = values.index(min(values))
        counts[smallest] += 1
        values[smallest] += step
    return counts


@settings(max_examples=150, deadline=None)
@given(VALUES, st.floats(1e-3, 5), st.integers(0, 40), st.data())
def test_fill_takes_what_the_plain_loop_takes(values, step, total, data):
    counts = data.draw(st.lists(st.integers(0, 1), min_size=len(values), max_size=len(values)))
    found = fill(torch.tensor([counts]), torch.tensor([values]), torch.tensor([step]), torch.tensor([total]))[0]
    slow = slow_fill(counts, values, step, total)
    assert int(found.sum()) == max(total, sum(counts))
    # Where two classes tie to the last bit the loop's own rounding decides: then what was paid must be the same.
    if found.tolist() != slow:
        paid = [sum(v + k * step for v, n, c in zip(values, row, counts, strict=True) for k in range(n - c))
                for row in (found.tolist(), slow)]  # fmt: skip
        assert paid[0] == pytest.approx(paid[1], abs=1e-6)


def test_a_step_of_zero_gives_everything_to_the_smallest():
    found = fill(
        torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[2.0, 1.0, 1.5]]), torch.zeros(1), torch.tensor([7])
    )
    assert found.tolist() == [[0, 7, 0]]


def test_rows_of_a_batch_do_not_touch_each_other():
    torch.manual_seed(0)
    values, step, totals = torch.randn(50, 10), torch.rand(50) + 0.01, torch.randint(0, 300, (50,))
    together = fill(torch.zeros(50, 10, dtype=torch.int64), values, step, totals)
    for n in range(50):
        assert together[n].tolist() == slow_fill([0] * 10, values[n], float(step[n]), int(totals[n]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-3, 6, width=32), min_size=2, max_size=4), st.integers(1, 6))
def test_rounding_is_the_nearest_of_all_multisets(expected, total):
    found = round_counts(torch.tensor([expected]), torch.tensor([total]))[0]

    def distance(row):
        return sum((n - e) ** 2 for n, e in zip(row, expected, strict=True))

    every = [row for row in itertools.product(range(total + 1), repeat=len(expected)) if sum(row) == total]
    assert int(found.sum()) == total
    assert distance(found.tolist()) == pytest.approx(min(map(distance, every)), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-2, 4, width=32), min_size=3, max_size=3), st.integers(1, 5), st.integers(1, 30))
def test_candidates_are_the_nearest_multisets_in_order(expected, total, candidates):
    expected = torch.tensor([expected])
    counts = round_counts(expected, torch.tensor([total]))
    guess = guesses_from(Counts(counts, expected), candidates)[0]
    found = [np.bincount(row, minlength=3) for row in guess.labels.numpy()]
    every = [np.array(r) for r in itertools.product(range(total + 1), repeat=3) if sum(r) == total]
    distance = sorted(float(((row - expected[0].numpy()) ** 2).sum()) for row in every)
    mine = [float(((row - expected[0].numpy()) ** 2).sum()) for row in found]
    assert len({tuple(row) for row in found}) == len(found) == min(candidates, len(every))
    assert mine == pytest.approx(distance[: len(mine)], abs=1e-4)
    assert (guess.confidence.diff() <= 1e-6).all()
    assert (guess.confidence > 0).all()
    assert float(guess.confidence.sum()) == pytest.approx(1.0, abs=1e-5)
    assert (guess.labels.diff(dim=1) >= 0).all()


def test_labels_behind_an_update():
    assert label_total(Observation(1, 0, {}, {}, LocalTraining("gradient", 8, 10, 3))) == 80
    with pytest.raises(UsageError, match=r"threat\.hyperparameters=true"):
        label_total(Observation(1, 0, {}, {}, LocalTraining(batch_size=8)))
    with pytest.raises(UsageError, match=r"threat\.batch_size=true"):
        label_total(Observation(1, 0, {}, {}))
    with pytest.raises(UsageError, match="at least 1"):
        label_total(Observation(1, 0, {}, {}, LocalTraining("gradient", 0, 1)))
