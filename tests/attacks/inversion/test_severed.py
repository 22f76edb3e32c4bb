"""Single samples behind layers that draw at random, and label multisets told apart by what they leave."""

import pytest
import torch
from torch import nn

from fedleak.attacks import Attack, Run
from fedleak.attacks.adaptive import seen_through
from fedleak.attacks.base import LabelGuess
from fedleak.attacks.image_prior import natural_prior
from fedleak.attacks.inversion import Chooser, screening
from fedleak.attacks.inversion.screening import screened
from fedleak.attacks.inversion.severed import cut_of
from fedleak.attacks.labels import Fedleak
from fedleak.attacks.problem import pose
from fedleak.data import digits
from fedleak.defenses import Pruning
from fedleak.errors import UsageError
from fedleak.instantiate import Part
from fedleak.models.bottleneck import VariationalBottleneck
from fedleak.models.check import hidden_draws
from fedleak.models.lenet import LeNet
from fedleak.studies.fresh import draw_victims
from fedleak.threat import ThreatModel


def victims(size, batch, seed=0, count=1, **settings):
    model = Part("model", {"_target_": "fedleak.models.LeNet", "init": "uniform", **settings})
    torch.manual_seed(seed)
    return draw_victims(digits(image_size=size), model, range(seed, seed + count), batch, ThreatModel(), 0)


@pytest.mark.parametrize("settings", [{"precode": 8}, {"dropout": 0.3}])
def test_what_is_drawn_above_a_layer_hides_nothing_below_it(settings):
    found = victims(12, 1, seed=1, **settings)
    attack = Attack(Fedleak(), Chooser(), adaptive=True)
    result = attack(found.observations, found.knowledge)[0]
    assert result.details["method"] == "severed"
    assert float((result.images - found.truths[0].images).square().mean()) < 1e-3


def test_where_a_model_can_be_cut():
    assert cut_of(LeNet(precode=4), True).layer == "bottleneck.encoder"
    assert cut_of(LeNet(dropout=0.25), True).kept == 0.75
    assert cut_of(LeNet(dropout=0.25), False) is None
    assert cut_of(LeNet(), True) is None
    early = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2))
    assert cut_of(early, True) is None


def test_a_bottleneck_draws_in_train_mode_only():
    layer, x = VariationalBottleneck(6, 2), torch.rand(3, 6)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    assert "bottleneck" in str(hidden_draws(LeNet(precode=4), True))
    for wrong in (-1, 1.5):
        with pytest.raises(UsageError, match=r"model\.precode"):
            LeNet(precode=wrong)
    with pytest.raises(UsageError, match=r"model\.dropout"):
        LeNet(dropout=1.0)


def test_of_several_multisets_the_one_that_explains_the_update_is_kept(monkeypatch):
    found = victims(12, 2)
    observation, truth = found.observations[0], found.truths[0]
    observation.update.update(Pruning(0.7).apply(dict(observation.update), generator=torch.Generator()))
    right = truth.labels.sort().values
    wrong = [(right + shift) % 10 for shift in (1, 2, 3)]
    guess = LabelGuess(torch.stack([*wrong[:2], right, wrong[2]]).sort(1).values, torch.full((4,), 0.25))
    knowledge = seen_through(found.knowledge, True)
    problems = {0: pose([observation], [guess], knowledge)}
    prior = natural_prior(knowledge.image_shape)
    assert screened(problems, [guess], knowledge, prior, Run())[0].labels.tolist() == [right.tolist()]
    sure = LabelGuess(guess.labels, torch.tensor([0.97, 0.01, 0.01, 0.01]))
    assert screened(problems, [sure], knowledge, prior, Run())[0].labels.tolist() == [wrong[0].sort().values.tolist()]
    monkeypatch.setattr(screening, "_BYTES", 1)
    assert screened(problems, [guess], knowledge, prior, Run())[0].labels.tolist() == [wrong[0].sort().values.tolist()]
