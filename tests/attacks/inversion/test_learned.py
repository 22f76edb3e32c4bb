"""Images read off defended updates by a regressor: better than the mean image, and as the attacker is told."""

from dataclasses import replace

import pytest
import torch

from fedleak.attacks import Attack
from fedleak.attacks.adaptive import lookalike
from fedleak.attacks.inversion import Learned, learned
from fedleak.attacks.inversion.learned import around, training_images
from fedleak.attacks.inversion.strongest import Strongest
from fedleak.attacks.labels import Fedleak
from fedleak.data import digits
from fedleak.defenses import Pruning, Sign
from fedleak.errors import UsageError
from fedleak.instantiate import Part
from fedleak.studies.fresh import draw_victims
from fedleak.threat import ThreatModel

LENET = Part("model", {"_target_": "fedleak.models.LeNet", "init": "uniform"})


@pytest.fixture(scope="module")
def victims():
    data = digits(image_size=12)
    found = draw_victims(data, LENET, range(1), 1, ThreatModel(auxiliary_data=True), 0)
    return replace(
        found, knowledge=replace(found.knowledge, auxiliary=(data.test_images.float() / 255, data.test_labels))
    )


def error(attack, done, victims, **told):
    generator = torch.Generator().manual_seed(0)
    sent = [replace(o, update=done.apply(dict(o.update), generator=generator)) for o in victims.observations]
    found = attack(sent, replace(victims.knowledge, **told))[0]
    return float((found.images - victims.truths[0].images).square().mean()), found


def test_signs_are_read(victims):
    mean = float((victims.knowledge.auxiliary[0].mean(0) - victims.truths[0].images).square().mean())
    reached, found = error(Attack(Fedleak(), Learned(examples=200, steps=0, rounds=1), adaptive=True), Sign(), victims)
    assert reached < 0.3 * mean
    assert found.details["expected_mse"][0] == pytest.approx(found.objective, rel=1e-3)
    told, _ = error(
        Attack(Fedleak(), Learned(examples=200, steps=0, rounds=1), adaptive=True), Sign(), victims, defense=Sign()
    )
    assert told == reached  # what is seen is what was done
    naive, _ = error(Attack(Fedleak(), Learned(examples=200, steps=0, rounds=0)), Sign(), victims)
    assert naive > reached


def test_the_network_is_one_of_the_regressors(victims):
    attack = Attack(Fedleak(), Learned(examples=40, projections=16, steps=5, rounds=0), adaptive=True)
    first, found = error(attack, Pruning(0.99), victims)
    assert found.details["method"].split()[-1] in ("kernel", "network")
    assert error(attack, Pruning(0.99), victims)[0] == first  # a seed decides
    inversion = Learned(projections=8, steps=30)
    updates = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
    targets = updates[:, :4].sigmoid()
    left_out = torch.arange(60) % 5 == 0
    _, answer, name = inversion._network(updates, targets, updates[0], left_out)
    assert name == "network"
    assert answer.shape == (4,)


def test_of_large_models_a_part_of_each_update_is_learned_from(victims, monkeypatch):
    monkeypatch.setattr(learned, "_NUMBERS", 60 * 500)
    attack = Attack(Fedleak(), Learned(examples=60, steps=0, rounds=0), adaptive=True)
    mean = float((victims.knowledge.auxiliary[0].mean(0) - victims.truths[0].images).square().mean())
    assert error(attack, Sign(), victims)[0] < mean


def test_our_best_reads_signs_so(victims):
    ours = Strongest(signs=Learned(examples=60, steps=0, rounds=0))
    _, found = error(Attack(Fedleak(), ours, adaptive=True), Sign(), victims, auxiliary=None)
    assert found.details["method"].endswith("kernel")


def test_what_an_update_looks_like():
    generator = torch.Generator().manual_seed(0)
    one, other = ({"w": torch.randn(10, 20, generator=generator)} for _ in range(2))
    for defense in (Sign(), Pruning(0.7)):
        made = lookalike(defense.apply(one, generator=generator))(other, generator)
        torch.testing.assert_close(made, defense.apply(other, generator=generator))
    assert torch.equal(lookalike(one)(other, generator)["w"], other["w"])


def test_images_to_train_on_are_made_of_the_auxiliary_ones(victims):
    generator = torch.Generator().manual_seed(0)
    images = training_images(victims.knowledge, 400, generator)
    assert images.shape == (400, 1, 12, 12)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    natural = training_images(replace(victims.knowledge, auxiliary=None), 20, generator)
    assert natural.shape == (20, 1, 12, 12)
    near = around(images[0], images, 1e-4, generator)
    assert float((near - images[0]).square().mean()) == pytest.approx(2e-4, rel=0.5)  # at the edges they are cut


def test_what_it_cannot_read_is_refused(victims):
    for setting in ({"examples": 3}, {"steps": -1}, {"rounds": 1.5}):
        with pytest.raises(UsageError, match=r"attack\.inversion\."):
            Learned(**setting)
    attack = Attack(Fedleak(), Learned(), adaptive=True)
    batch = draw_victims(digits(image_size=12), LENET, range(1), 2, ThreatModel(auxiliary_data=True), 0)
    with pytest.raises(UsageError, match="batch_size=1"):
        attack(batch.observations, replace(victims.knowledge, model=batch.knowledge.model))
