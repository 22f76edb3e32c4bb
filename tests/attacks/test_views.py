"""What an attacker sees of the captures."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedleak.attacks import SecureSum, Updates
from fedleak.capture import Observation
from fedleak.errors import UsageError
from fedleak.local_update import local_update
from fedleak.training import SGD, LocalTraining

SIZES = [2, 3, 1, 4, 2]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).double()


START = {name: value.detach() for name, value in model().named_parameters()}


def clients(payload, **training):
    """Five clients with one local step each, what they sent, and their data."""
    torch.manual_seed(1)
    seen, data = [], []
    for client, size in enumerate(SIZES):
        images, labels = torch.rand(size, 1, 3, 3).double(), torch.randint(3, (size,))
        known = LocalTraining(**({"batch_size": size, "local_steps": 1, "optimizer": SGD(0.5)} | training))
        known = replace(known, payload=payload)
        update = local_update(model(), START, {}, images, labels, known).update
        seen.append(Observation(1, client, START, update, known, labels=labels.sort().values))
        data.append((images, labels))
    return seen, data


def test_updates_are_all_of_them():
    seen, _ = clients("gradient")
    assert Updates()(seen) == seen
    assert Updates().training(seen[0].training) == seen[0].training


@pytest.mark.parametrize("payload", ["gradient", "weights"])
def test_a_sum_is_the_update_of_one_client_with_all_the_samples(payload):
    seen, data = clients(payload)
    broken = replace(seen[1], client=9, error="client error")
    sums = SecureSum(2)([seen[3], broken, seen[0], seen[2], seen[1], seen[4]])
    assert [(o.round, o.client, o.clients) for o in sums] == [(1, 0, (0, 1)), (1, 2, (2, 3))]
    for o, members in zip(sums, ([0, 1], [2, 3]), strict=True):
        assert o.training == replace(seen[0].training, batch_size=sum(SIZES[m] for m in members))
        images, labels = (torch.cat([data[m][part] for m in members]) for part in (0, 1))
        whole = local_update(model(), START, {}, images, labels, replace(o.training, payload="gradient")).update
        for name, value in o.gradient().items():
            torch.testing.assert_close(value, whole[name])
        assert o.labels.tolist() == labels.sort().values.tolist()


def test_rounds_are_summed_apart_and_withheld_sizes_count_alike():
    seen, _ = clients("gradient")
    blind = [replace(o, round=r, training=replace(o.training, batch_size=None)) for r in (2, 1) for o in seen[:2]]
    sums = SecureSum(2)(blind)
    assert [(o.round, o.clients) for o in sums] == [(1, (0, 1)), (2, (0, 1))]
    assert sums[0].training.batch_size is None
    name = "1.bias"
    torch.testing.assert_close(sums[0].update[name], (seen[0].update[name] + seen[1].update[name]) / 2)


def test_what_cannot_be_summed_is_refused():
    seen, _ = clients("gradient")
    with pytest.raises(UsageError, match=r"attack\.view\.clients=6: .*5 at most"):
        SecureSum(6)(seen)
    moved = {name: value + 1 for name, value in START.items()}
    with pytest.raises(UsageError, match=r"clients 0 and 1 of round 1 did not train alike"):
        SecureSum(2)([seen[0], replace(seen[1], parameters=moved)])
    with pytest.raises(UsageError, match=r"did not train alike"):
        SecureSum(2)([seen[0], replace(seen[1], training=replace(seen[1].training, epochs=2))])
    for clients_ in (0, 1.5, True, None):
        with pytest.raises(UsageError, match=r"attack\.view\.clients="):
            SecureSum(clients_)


def test_what_is_asked_of_an_attack_is_asked_of_the_sum():
    assert SecureSum(3).training(LocalTraining(batch_size=4)).batch_size == 12
    assert SecureSum(3).training(LocalTraining()).batch_size is None
