"""The methods that read single samples or nothing: iDLG, per-sample, known, joint, random."""

import pytest
import torch
from torch import nn

from fedleak.attacks.base import Run
from fedleak.attacks.labels import IDLG, Joint, Known, PerSample, Random
from fedleak.capture import Observation
from fedleak.errors import UsageError
from fedleak.training import SGD, LocalTraining


@pytest.mark.parametrize("uniform", [True, False])
def test_idlg_is_exact_on_a_thousand_networks_in_both_payloads(observe, lenet, knowing, uniform):
    observations, truth = [], []
    for seed in range(500):
        model = lenet(seed, uniform=uniform)
        truth.append(seed % 10)
        payload = "weights" if seed % 2 else "gradient"
        images = torch.rand(1, 1, 12, 12)
        observations.append(observe(model, images, torch.tensor(truth[-1:]), payload=payload, grant_lr=seed % 3 > 0))
    guesses = IDLG().infer(observations, knowing(lenet(0)), Run())
    assert [guess.best.tolist() for guess in guesses] == [[label] for label in truth]


def test_idlg_reads_features_of_either_sign(observe, knowing):
    for seed in range(50):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(144, 9), nn.Tanh(), nn.Linear(9, 10, bias=False))
        observation = observe(model, torch.rand(1, 1, 12, 12), torch.tensor([seed % 10]))
        assert IDLG().infer([observation], knowing(model), Run())[0].best.tolist() == [seed % 10]


def test_idlg_needs_no_batch_size_but_refuses_a_known_batch(observe, lenet, knowing):
    model = lenet(0)
    single = observe(model, torch.rand(1, 1, 12, 12), torch.tensor([4]), batch_size=None, local_steps=None)
    assert IDLG().infer([single], knowing(model), Run())[0].best.tolist() == [4]
    batch = observe(model, torch.rand(3, 1, 12, 12), torch.tensor([4, 4, 5]))
    with pytest.raises(UsageError, match=r"idlg.*holds 3; choose attack/labels=fedleak"):
        IDLG().infer([batch], knowing(model), Run())


@pytest.mark.parametrize("payload", ["gradient", "weights"])
def test_per_sample_reads_each_sample(observe, lenet, knowing, payload):
    model = lenet(1)
    labels = torch.tensor([7, 0, 7, 3])
    singles = [observe(model, torch.rand(1, 1, 12, 12), label.view(1), payload=payload) for label in labels]
    update = {name: torch.stack([single.update[name] for single in singles]) for name in singles[0].update}
    observation = Observation(
        1, 0, singles[0].parameters, update, LocalTraining(payload, 4, 1, optimizer=SGD(0.1), per_sample=True)
    )
    assert PerSample().infer([observation], knowing(model), Run())[0].best.tolist() == [0, 3, 7, 7]
    with pytest.raises(UsageError, match=r"threat\.per_sample_gradients=true"):
        PerSample().infer([singles[0]], knowing(model), Run())


def test_known_returns_the_granted_labels(lenet, knowing):
    model = lenet(0)
    observation = Observation(1, 0, {}, {}, labels=torch.tensor([2, 2, 9]))
    assert Known().infer([observation], knowing(model), Run())[0].labels.tolist() == [[2, 2, 9]]
    assert Known.needs == {"labels"}
    with pytest.raises(UsageError, match=r"threat\.labels=true"):
        Known().infer([Observation(1, 0, {}, {})], knowing(model), Run())


def test_joint_leaves_the_labels_open(lenet, knowing):
    assert Joint().infer([Observation(1, 0, {}, {})] * 3, knowing(lenet(0)), Run()) == [None] * 3


def test_random_depends_on_seed_round_and_client_alone(lenet, knowing):
    knowledge = knowing(lenet(0))
    observations = [
        Observation(r, c, {}, {}, LocalTraining(batch_size=64, local_steps=2)) for r in (1, 2) for c in (0, 1)
    ]
    together = [guess.best for guess in Random().infer(observations, knowledge, Run(seed=3))]
    alone = [Random().infer([observation], knowledge, Run(seed=3))[0].best for observation in observations]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert len({tuple(labels.tolist()) for labels in together}) == 4
    assert all(labels.shape == (128,) and set(labels.tolist()) <= set(range(10)) for labels in together)
    assert Random().infer(observations[:1], knowledge, Run(), candidates=3)[0].labels.shape == (3, 128)


@pytest.mark.parametrize("method", [IDLG(), PerSample(), Known(), Random(), Joint()])
def test_an_observation_with_an_error_is_passed_over(lenet, knowing, method):
    broken = Observation(1, 0, {}, {}, error="the client raised ValueError")
    assert method.infer([broken], knowing(lenet(0)), Run()) == [None]
