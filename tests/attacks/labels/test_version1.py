import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedleak.attacks.base import Run
from fedleak.attacks.labels import Version1
from fedleak.attacks.labels.version1 import version1
from fedleak.errors import UsageError

WORKED = [0.00025919, 0.11972682, -150.86856079, 5.43740320, 0.00529321, -44.64388275, 0.00018300, 142.47997047,
          -50.12918472, 97.59877014]  # fmt: skip


def labels_of(counts):
    return torch.arange(counts.shape[-1]).repeat_interleave(counts).tolist()


def slow_version1(gradients, batch_size):
    """Word for word from the founding study."""
    gradients = list(gradients)
    labels = [c for c, g in enumerate(gradients) if g < 0]
    impact = sum(g for g in gradients if g < 0) / batch_size
    while len(labels) < batch_size:
        smallest = gradients.index(min(gradients))
        labels.append(smallest)
        gradients[smallest] -= impact
    return sorted(labels)


def test_the_worked_example_of_the_founding_study():
    assert labels_of(version1(torch.tensor([WORKED]), torch.tensor([6])).counts[0]) == [2, 2, 2, 2, 5, 8]


def test_batches_of_different_sizes_in_one_call():
    gradients = torch.tensor([WORKED, WORKED, WORKED])
    found = version1(gradients, torch.tensor([6, 4, 30])).counts
    for row, size in zip(found, (6, 4, 30), strict=True):
        assert labels_of(row) == slow_version1(WORKED, size)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12).flatmap(lambda c: st.lists(st.floats(-50, 50).filter(lambda x: abs(x) > 1e-3), min_size=c,
       max_size=c)), st.integers(1, 60))  # fmt: skip
def test_agrees_with_the_plain_loop(gradients, batch_size):
    negative = sum(g < 0 for g in gradients)
    if not 1 <= negative <= batch_size:
        return
    found = version1(torch.tensor([gradients], dtype=torch.float64), torch.tensor([batch_size])).counts[0]
    slow = torch.bincount(torch.tensor(slow_version1(gradients, batch_size)), minlength=len(gradients))
    assert int(found.sum()) == batch_size
    assert int((found - slow).abs().sum()) <= 2  # equal but for ties in the last bit
    if int((found - slow).abs().sum()):
        impact = sum(g for g in gradients if g < 0) / batch_size
        levels = [g - impact * n for g, n in zip(gradients, (found - slow).clamp(min=0).tolist(), strict=True)]
        assert len({round(level / impact % 1, 6) for level in levels}) < len(levels)


def test_more_negative_classes_than_samples_keeps_the_most_negative():
    found = version1(torch.tensor([[-1.0, -3.0, -2.0, 4.0]]), torch.tensor([2])).counts
    assert labels_of(found[0]) == [1, 2]


def test_no_negative_class_fills_the_batch_with_the_smallest():
    assert labels_of(version1(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([4])).counts[0]) == [1, 1, 1, 1]


def test_a_positive_factor_changes_nothing():
    gradients = torch.randn(20, 10)
    sizes = torch.full((20,), 16)
    assert torch.equal(version1(gradients, sizes).counts, version1(gradients * 1e-4, sizes).counts)


@pytest.mark.parametrize(("sizes", "words"), [([6, 6], r"\[N\] batch sizes"), ([0], "at least 1")])
def test_unequal_lengths_and_empty_batches_are_refused(sizes, words):
    with pytest.raises(UsageError, match=words):
        version1(torch.tensor([WORKED]), torch.tensor(sizes))


def test_one_step_of_fedavg_gives_the_labels_of_fedsgd(observe, lenet, knowing):
    model = lenet(3, uniform=True)
    images, labels = torch.rand(8, 1, 12, 12), torch.tensor([0, 0, 0, 0, 1, 1, 5, 9])
    observations = [
        observe(model, images, labels, payload="gradient"),
        observe(model, images, labels, payload="weights"),
        observe(model, images, labels, payload="weights", grant_lr=False),
    ]
    guesses = [guess.best.tolist() for guess in Version1().infer(observations, knowing(model), Run())]
    g = observations[0].update["fc.weight"].double().sum(dim=1).tolist()
    assert guesses == [slow_version1(g, 8)] * 3


def test_all_samples_of_several_local_steps_are_labelled(observe, lenet, knowing):
    model = lenet(3)
    observation = observe(model, torch.rand(12, 1, 12, 12), torch.arange(12) % 10, payload="weights", steps=3)
    guess = Version1().infer([observation], knowing(model), Run(), candidates=4)[0]
    assert guess.labels.shape == (4, 12)


def test_a_withheld_batch_size_is_refused(observe, lenet, knowing):
    model = lenet(3)
    observation = observe(model, torch.rand(2, 1, 12, 12), torch.tensor([1, 2]), batch_size=None)
    assert Version1.needs == {"batch_size"}
    with pytest.raises(UsageError, match=r"threat\.batch_size=true"):
        Version1().infer([observation], knowing(model), Run())
