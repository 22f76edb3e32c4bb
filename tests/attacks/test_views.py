"""What an attacker sees of the captures."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedleak.attacks import SecureSum, Updates
from fedleak.attacks.views import ConsecutiveModels, shown
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


@pytest.mark.parametrize("payload", ["gradient", "weights"])
def test_the_sum_of_one_client_is_that_client(payload):
    seen, _ = clients(payload)
    (alone,) = shown("sum", seen[1:2])
    assert alone.training == seen[1].training
    assert all(torch.equal(value, alone.update[name]) for name, value in seen[1].update.items())
    assert shown("sum", [alone]) == [alone], "a sum is not summed again"
    assert shown("updates", seen) == seen
    everyone = shown("sum", [*seen, replace(seen[0], client=9, error="client error")])
    assert [o.clients for o in everyone] == [(0, 1, 2, 3, 4)]


def server(seen):
    """The model after a round in which everyone's update was averaged."""
    total = sum(SIZES)
    if seen[0].training.payload == "weights":
        return {n: sum(s / total * o.update[n] for s, o in zip(SIZES, seen, strict=True)) for n in START}
    return {
        n: v - 0.5 * sum(s / total * o.update[n] for s, o in zip(SIZES, seen, strict=True)) for n, v in START.items()
    }


@pytest.mark.parametrize("payload", ["gradient", "weights"])
def test_consecutive_models_tell_what_the_sum_tells(payload):
    seen, _ = clients(payload)
    following = [replace(o, round=2, parameters=server(seen)) for o in seen]
    (pair,) = ConsecutiveModels()([*seen, *following])
    (whole,) = shown("sum", seen)
    assert (pair.round, pair.clients, pair.training.samples) == (1, (0, 1, 2, 3, 4), sum(SIZES))
    assert pair.labels.tolist() == whole.labels.tolist()
    for name, value in whole.gradient().items():
        torch.testing.assert_close(pair.gradient()[name], value)
    poisoned = [replace(o, update={n: v * float("nan") for n, v in o.update.items()}) for o in (*seen, *following)]
    (blind,) = ConsecutiveModels()(poisoned)
    assert all(torch.equal(blind.update[name], value) for name, value in pair.update.items()), "it uses models alone"


def test_consecutive_models_refuse_gaps():
    seen, _ = clients("gradient")
    later = [replace(o, round=r) for r in (1, 2, 4) for o in seen]
    with pytest.raises(UsageError, match=r"the model of round 3 was not captured.*capture_every=1"):
        ConsecutiveModels()(later)
    with pytest.raises(UsageError, match="two rounds at least"):
        ConsecutiveModels()(seen)
