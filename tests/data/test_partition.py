import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedleak.data import IID, Biased, Dirichlet, Shards
from fedleak.errors import UsageError

COVERING = [IID(), Dirichlet(0.5), Dirichlet(1e-300), Dirichlet(1e6), Shards(1)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def even_labels(count, classes=10):
    return torch.arange(count) % classes


labels_and_clients = st.lists(st.integers(0, 4), min_size=1, max_size=60).flatmap(
    lambda labels: st.tuples(st.just(torch.tensor(labels)), st.integers(1, len(labels)))
)


@pytest.mark.parametrize("partitioner", [*COVERING, Biased()], ids=lambda p: type(p).__name__)
@settings(max_examples=60, deadline=None)
@given(case=labels_and_clients, seed=st.integers(0, 99))
def test_parts_are_disjoint_non_empty_and_decided_by_the_generator(partitioner, case, seed):
    labels, clients = case
    if isinstance(partitioner, Biased) and len(labels.unique()) < 2:
        return
    parts = partitioner(labels, clients, generator(seed))
    assert len(parts) == clients
    assert all(part.dtype == torch.int64 and len(part) > 0 for part in parts)
    together = torch.cat(parts)
    assert len(together.unique()) == len(together)
    assert together.min() >= 0
    assert together.max() < len(labels)
    if partitioner in COVERING:
        assert len(together) == len(labels)
    again = partitioner(labels, clients, generator(seed))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize("partitioner", [IID(), Dirichlet(0.5), Shards(2), Biased()], ids=lambda p: type(p).__name__)
def test_another_seed_gives_another_split(partitioner):
    labels = even_labels(200)
    parts, other = partitioner(labels, 5, generator(0)), partitioner(labels, 5, generator(1))
    assert any(not torch.equal(a, b) for a, b in zip(parts, other, strict=True))


@pytest.mark.parametrize("partitioner", [IID(), Dirichlet(0.5), Shards(2), Biased()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("clients", [0, -1, 2.0, True, 21])
def test_impossible_numbers_of_clients_are_refused(partitioner, clients):
    with pytest.raises(UsageError, match=rf"^federation\.clients={clients} .*give"):
        partitioner(even_labels(20), clients, generator())


def test_iid_shares_images_equally():
    sizes = [len(part) for part in IID()(even_labels(103), 10, generator())]
    assert sorted(sizes) == [10] * 7 + [11] * 3


def test_iid_gives_every_client_every_class_in_proportion():
    labels = even_labels(10_000)
    for part in IID()(labels, 5, generator()):
        # 200 of a class are expected; five standard deviations of the hypergeometric are 60.
        assert (torch.bincount(labels[part], minlength=10) - 200).abs().max() < 60


def test_shards_limit_the_classes_of_a_client():
    labels = even_labels(1000)
    parts = Shards(2)(labels, 50, generator())  # 100 shards of 10 images, 10 to a class
    assert all(len(part) == 20 for part in parts)
    assert all(len(labels[part].unique()) <= 2 for part in parts)


def test_shards_need_an_image_each():
    assert len(Shards(4)(even_labels(20), 5, generator())) == 5
    with pytest.raises(UsageError, match=r"^partition\.shards_per_client=5 .*at most 4"):
        Shards(5)(even_labels(20), 5, generator())


@pytest.mark.parametrize("value", [0, -2, 1.5, None, True])
def test_impossible_shards_are_refused(value):
    with pytest.raises(UsageError, match=rf"^partition\.shards_per_client={value} "):
        Shards(value)


def test_a_small_alpha_is_skewed_and_a_large_one_is_not():
    labels = even_labels(10_000)

    def largest_share(alpha):
        parts = Dirichlet(alpha)(labels, 10, generator())
        return [float(torch.bincount(labels[part]).max() / len(part)) for part in parts if len(part) > 50]

    assert min(largest_share(0.01)) > 0.3
    assert max(largest_share(1e4)) < 0.15


def test_dirichlet_shares_have_the_variance_of_the_distribution():
    # Var of one share of Dir(alpha) over K clients is (K - 1) / (K² (K·alpha + 1)).
    labels = torch.arange(100_000) % 500
    alpha, clients = 0.5, 4
    counts = torch.stack(
        [torch.bincount(labels[part], minlength=500) for part in Dirichlet(alpha)(labels, clients, generator())]
    )
    shares = counts / counts.sum(0)
    expected = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert float(shares.var()) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("value", [0, -0.5, math.nan, math.inf, "a", None, True])
def test_an_impossible_alpha_is_refused(value):
    with pytest.raises(UsageError, match=rf"^partition\.alpha={value} .*give"):
        Dirichlet(value)


@pytest.mark.parametrize("clients", [1, 3, 10, 17, 40])
def test_biased_clients_hold_a_half_a_quarter_and_a_random_quarter(clients):
    labels = torch.cat([torch.full((90 + 7 * c,), c) for c in range(10)])
    parts = Biased()(labels, clients, generator())
    assert len({len(part) for part in parts}) == 1
    for part in parts:
        size, counts = len(part), torch.bincount(labels[part], minlength=10).sort(descending=True).values
        assert abs(counts[0] - size / 2) <= 1
        assert abs(counts[1] - size / 4) <= 1
        assert abs(counts[2:].sum() - size / 4) <= 1


def test_biased_uses_nearly_all_images_where_classes_and_clients_match():
    labels = even_labels(10_000)
    parts = Biased()(labels, 10, generator())
    assert sum(map(len, parts)) > 9_000
    main = [int(torch.bincount(labels[part]).argmax()) for part in parts]
    assert sorted(main) == list(range(10))  # nobody's main class is another's while classes are left


def test_biased_keeps_the_skew_where_classes_run_out():
    labels = even_labels(10_000)
    (part,) = Biased()(labels, 1, generator())
    assert 1_900 <= len(part) <= 2_000  # all 1,000 images of one class are half of it
    assert torch.bincount(labels[part]).max() == pytest.approx(len(part) / 2, abs=1)


def test_biased_is_not_shrunk_by_one_rare_class():
    labels = torch.cat([even_labels(1000), torch.tensor([10])])
    assert len(Biased()(labels, 5, generator())[0]) > 150


def test_biased_over_two_classes_draws_the_last_quarter_from_both():
    labels = even_labels(400, classes=2)
    for part in Biased()(labels, 2, generator()):
        shares = torch.bincount(labels[part]) / len(part)
        assert shares.max() >= 0.5
        assert shares.min() >= 0.25 - 1 / len(part)


def test_biased_needs_two_classes():
    with pytest.raises(UsageError, match="at least two classes"):
        Biased()(torch.zeros(10, dtype=torch.int64), 2, generator())
