import pytest
import torch

from fedleak.federation.scenario import build_scenario
from fedleak.setup import compose
from fedleak.training import SGD, Adam, AdamW


def scenario(*overrides: str):
    return build_scenario(compose(overrides))


def test_what_is_federated_are_parameters_and_statistics_not_the_normalisation():
    parameters, buffers = scenario("model=resnet18", "data.image_size=32").start()
    assert not any("normalize" in name for name in (*parameters, *buffers))
    assert any("running_mean" in name for name in buffers)
    assert all(value.is_floating_point() for value in buffers.values())


def test_a_private_batch_depends_on_seed_client_and_round_alone():
    one = scenario("federation.batch_size=3", "seed=1")
    a, b = one.private_batch(0, 1)[0], one.private_batch(0, 2)[0]
    one.private_batch(1, 1)
    assert torch.equal(a, scenario("federation.batch_size=3", "seed=1").private_batch(0, 1)[0])
    assert not torch.equal(a, b)
    assert not torch.equal(a, scenario("federation.batch_size=3", "seed=2").private_batch(0, 1)[0])
    assert a.shape == (3, 1, 28, 28)
    assert 0 <= a.min() <= a.max() <= 1


def test_local_steps_go_through_the_clients_images_before_repeating_any():
    s = scenario("federation.clients=100", "federation.batch_size=4", "federation.local_steps=3")
    images, labels = s.private_batch(0, 1)
    assert len(images) == len(labels) == 12
    assert len({bytes(image.numpy()) for image in images}) == 12
    few = scenario("federation.clients=700", "federation.batch_size=4", "federation.local_steps=2")
    assert len(few.private_batch(0, 1)[0]) == 2 * min(4, len(few.parts[0]))


def test_auxiliary_data_is_granted_or_not_and_never_measures_utility():
    granted = scenario("threat.auxiliary_data=true")
    assert not set(granted.auxiliary.tolist()) & set(granted.utility.tolist())
    images, labels = granted.auxiliary_data()
    assert len(images) == len(labels) == len(granted.auxiliary) > 0
    withheld = scenario()
    assert withheld.auxiliary_data() is None
    assert torch.equal(withheld.parts[0], granted.parts[0]), "a grant must not change the federation"


def test_the_seed_decides_model_and_partition():
    a, b, c = scenario("seed=1"), scenario("seed=1", "engine=ray"), scenario("seed=2")
    assert torch.equal(a.model.fc.weight, b.model.fc.weight)
    assert not torch.equal(a.model.fc.weight, c.model.fc.weight)
    assert all(torch.equal(x, y) for x, y in zip(a.parts, b.parts, strict=True))


def test_fixed_batches_are_the_same_in_every_round():
    fixed = scenario("federation.batches=fixed")
    assert torch.equal(fixed.private_batch(0, 1)[0], fixed.private_batch(0, 7)[0])
    assert not torch.equal(fixed.private_batch(0, 1)[0], fixed.private_batch(1, 1)[0])


def test_the_learning_rate_decays_over_rounds():
    s = scenario("federation.lr_decay=0.5", "federation.lr=0.2", "federation.optimizer=nesterov")
    assert s.training_in(3).optimizer == SGD(0.05, 0.9, nesterov=True)
    assert s.training == s.training_in(1)


@pytest.mark.parametrize(
    ("overrides", "optimizer"),
    [
        (["sgd"], SGD(0.1)),
        (["momentum", "federation.momentum=0.5"], SGD(0.1, 0.5)),
        (["adam", "federation.betas=[0.8,0.9]", "federation.eps=1e-4"], Adam(0.1, (0.8, 0.9), 1e-4)),
        (["adamw", "federation.weight_decay=0.1"], AdamW(0.1, weight_decay=0.1)),
    ],
)
def test_the_optimiser_is_the_one_that_was_named(overrides, optimizer):
    assert compose([f"federation.optimizer={overrides[0]}", *overrides[1:]]).training.optimizer == optimizer


def test_some_sampled_clients_drop_out():
    s = scenario("federation.dropout=0.5")
    assert sum(s.drops_out(client, 1) for client in range(4)) == 2
    assert not any(scenario().drops_out(client, 1) for client in range(4))
