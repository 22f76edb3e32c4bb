"""DP-SGD and local privacy: the mechanism against a literal reference, ε against opacus' own accountant."""

import math

import pytest
import torch

from fedleak.defenses import DPSGD, Chain, Gaussian, LocalDP, NoDefense
from fedleak.defenses.accountant import gaussian_epsilon, reconstruction_bound
from fedleak.errors import UsageError
from fedleak.training import SGD, LocalTraining


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("delta", [1e-5, 1e-3])
@pytest.mark.parametrize(
    ("sigma", "rate", "steps"), [(1.0, 0.01, 1000), (0.5, 0.1, 100), (4.0, 1.0, 50), (0.3, 0.003, 200), (2.0, 0.5, 10)]
)
def test_epsilon_is_the_accountants_own(sigma, rate, steps, delta):
    accountants = pytest.importorskip("opacus.accountants")
    accountant = accountants.RDPAccountant()
    accountant.history = [(sigma, rate, steps)]
    mine = gaussian_epsilon(noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=delta)
    assert mine == pytest.approx(accountant.get_epsilon(delta), rel=1e-4)


def test_epsilon_at_the_edges():
    given = {"sample_rate": 0.1, "steps": 10, "delta": 1e-5}
    assert gaussian_epsilon(noise_multiplier=0.0, **given) == math.inf
    assert gaussian_epsilon(noise_multiplier=1.0, **{**given, "steps": 0}) == 0
    run = {"rounds": 20, "local_steps": 2, "sample_rate": 0.1, "delta": 1e-5}
    assert NoDefense().epsilon(**run) is None
    one = DPSGD(1.0).epsilon(**run)
    assert one == gaussian_epsilon(noise_multiplier=1.0, sample_rate=0.1, steps=40, delta=1e-5)
    assert Chain([DPSGD(1.0), Gaussian(0.1)]).epsilon(**run) == one
    assert LocalDP(1.0).epsilon(**run) > LocalDP(1.0).epsilon(**{**run, "rounds": 1}) > 0


def test_every_sample_is_clipped_and_the_sum_has_the_noise():
    gradients = {"w": torch.tensor([[3.0, 0.0], [0.3, 0.0]]), "b": torch.tensor([[4.0], [0.4]])}
    clipped = DPSGD(0.0, norm=2.0).examples(gradients, generator=generator())
    torch.testing.assert_close(clipped["w"], torch.tensor([[1.2, 0.0], [0.3, 0.0]]))  # norms 5 and .5
    torch.testing.assert_close(clipped["b"], torch.tensor([[1.6], [0.4]]))
    many = {"w": torch.zeros(4, 40_000)}
    sums = DPSGD(0.5, norm=3.0).examples(many, generator=generator())["w"].sum(0)
    assert float(sums.std()) == pytest.approx(1.5, rel=5 / math.sqrt(80_000))
    assert DPSGD().per_example


@pytest.mark.parametrize("payload", ["gradient", "weights"])
def test_the_imitation_has_the_noise_of_what_is_sent(payload):
    training = LocalTraining(payload, batch_size=4, local_steps=9, optimizer=SGD(0.1))
    noise = DPSGD(2.0, norm=0.5).imitate({"w": torch.zeros(3)}, training).noise["w"]
    assert noise == pytest.approx(2.0 * 0.5 / 4 * 3 * (0.1 if payload == "weights" else 1))


def test_one_sample_is_imitated_by_its_clipping():
    one = LocalTraining("gradient", batch_size=1, local_steps=1)
    function = DPSGD(0.0, norm=1.0).imitate({"w": torch.zeros(2)}, one).function
    torch.testing.assert_close(function({"w": torch.tensor([3.0, 4.0])})["w"], torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(function({"w": torch.tensor([0.3, 0.4])})["w"], torch.tensor([0.3, 0.4]))


def test_local_privacy_clips_and_adds_the_gaussian_mechanisms_noise():
    defense = LocalDP(epsilon=0.5, delta=1e-6, norm=2.0)
    std = 2 * 2.0 * math.sqrt(2 * math.log(1.25 / 1e-6)) / 0.5
    update = {"w": torch.full((40_000,), 1.0), "steps": torch.tensor(3)}
    after = defense.apply(update, generator=generator())
    assert float(after["w"].mean()) == pytest.approx(2.0 / 200, abs=5 * std / 200)
    assert float(after["w"].std()) == pytest.approx(std, rel=5 / math.sqrt(80_000))
    assert int(after["steps"]) == 3
    found = defense.imitate(after, LocalTraining())
    assert found.noise["w"] == pytest.approx(std)
    assert float(found.function({"w": torch.tensor([3.0, 4.0])})["w"].norm()) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPSGD(-1.0), r"defense\.noise=-1\.0 .*at least 0"),
        (lambda: DPSGD(1.0, norm=0), r"defense\.norm=0 .*above 0"),
        (lambda: LocalDP(0), r"defense\.epsilon=0 .*above 0"),
        (lambda: LocalDP(1.0, delta=1.0), r"defense\.delta=1\.0: must be a number between 0 and 1"),
    ],
)
def test_impossible_strengths(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_the_chance_of_a_reconstruction_is_bounded():
    given = {"sample_rate": 1.0, "steps": 1, "guess": 0.1}
    # One release of the Gaussian mechanism, attacked by a draw: accept where the likelihood ratio is in its top tenth.
    draws = torch.randn(400_000, generator=generator(), dtype=torch.float64)
    reached = float((draws + 1 / 2.0 > draws.quantile(0.9)).double().mean())
    assert reconstruction_bound(noise_multiplier=2.0, **given) == pytest.approx(reached, abs=0.005)
    assert reconstruction_bound(noise_multiplier=0.0, **given) == 1.0
    assert reconstruction_bound(noise_multiplier=1.0, **{**given, "steps": 0}) == 0.1
    assert reconstruction_bound(noise_multiplier=1e4, **given) == pytest.approx(0.1, rel=1e-3)
    many = {"sample_rate": 0.01, "steps": 300, "guess": 0.1}
    assert reconstruction_bound(noise_multiplier=1.0, **many) < reconstruction_bound(
        noise_multiplier=1.0, **{**many, "sample_rate": 1.0}
    )
    run = {"rounds": 3, "local_steps": 1, "sample_rate": 1.0, "guess": 0.1}
    one = DPSGD(2.0).reconstruction(**run)
    assert one == reconstruction_bound(noise_multiplier=2.0, **{**given, "steps": 3})
    assert Chain([NoDefense(), DPSGD(2.0)]).reconstruction(**run) == one
    assert Gaussian(0.1).reconstruction(**run) is None
