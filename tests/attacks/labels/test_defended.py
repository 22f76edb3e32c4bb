"""Labels from what pruning and masking leave of an update."""

from dataclasses import replace

import pytest
import torch

from fedleak.attacks import Attack, Knowledge, Run
from fedleak.attacks.inversion import GradientMatching
from fedleak.attacks.labels import Fedleak, Version1
from fedleak.attacks.labels.defended import Defended, FromWhatIsLeft, fitted, scale_of
from fedleak.data import digits
from fedleak.defenses import Clipping, Masking, NoDefense, Pruning
from fedleak.evaluation.metrics import label_accuracy
from fedleak.instantiate import Part
from fedleak.models.build import build_model
from fedleak.studies.captured import Captured
from fedleak.studies.fresh import client_update, draw_victims
from fedleak.threat import ThreatModel
from fedleak.truth import Truth


@pytest.fixture(scope="module")
def victims():
    return draw_victims(digits(), Part("model", {"_target_": "fedleak.models.LeNet"}), range(12), 4, ThreatModel(), 0)


def accuracy(method, defense, victims):
    generator = torch.Generator().manual_seed(0)
    sent = [replace(o, update=defense.apply(dict(o.update), generator=generator)) for o in victims.observations]
    guesses = method.infer(sent, victims.knowledge, Run(seed=0))
    found = [label_accuracy(t.labels, guess.best) for t, guess in zip(victims.truths, guesses, strict=True)]
    return sum(found) / len(found)


@pytest.mark.parametrize("defense", [Pruning(0.7), Masking(0.9), Clipping(0.1)])
def test_what_is_left_tells_as_much_as_all_of_it(defense, victims):
    whole = accuracy(FromWhatIsLeft(), NoDefense(), victims)
    assert whole > 0.9
    assert accuracy(FromWhatIsLeft(), defense, victims) > whole - 0.2


def test_the_bias_gradient_is_fitted_through_gaps():
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    d = d - d.mean(1, keepdim=True)
    h = torch.rand(3, 600, generator=generator, dtype=torch.float64)
    weight = d[..., None] * h[:, None]
    torch.testing.assert_close(fitted(weight, h), d)
    torch.testing.assert_close(fitted(weight * (torch.rand(weight.shape, generator=generator) < 0.3), h), d)
    pruned = torch.stack([torch.where(w.abs() >= w.abs().flatten().median(), w, 0.0) for w in weight])
    assert (fitted(pruned, h) - d).abs().max() < 0.15 * d.abs().max()


def test_a_size_that_was_changed_is_undone():
    bias, mean = torch.tensor([[0.5, -0.6, 0.1]]), torch.tensor([[0.5, 0.4, 0.1]])
    assert scale_of(bias, mean).tolist() == [1.0]
    assert scale_of(0.01 * bias, mean).tolist() == pytest.approx([0.01])


def test_only_updates_with_gaps_are_read_another_way(victims):
    knowledge, whole = victims.knowledge, victims.observations[0]
    pruned = replace(whole, update=Pruning(0.7).apply(dict(whole.update), generator=torch.Generator()))
    method = Defended(Version1())
    found = method.infer([whole, pruned, whole], knowledge, Run())
    assert torch.equal(found[0].labels, Version1().infer([whole], knowledge, Run())[0].labels)
    assert torch.equal(found[1].labels, FromWhatIsLeft().infer([pruned], knowledge, Run())[0].labels)
    assert torch.equal(found[2].labels, found[0].labels)
    assert isinstance(Attack(Fedleak(), GradientMatching(), adaptive=True).labels, Defended)
    assert isinstance(Attack(Version1(), GradientMatching(), adaptive=True).labels, Version1)


def test_of_a_trained_model_batches_are_simulated_through_the_same_gaps(victims):
    data = digits(image_size=16)
    images, labels = data.train_images.float() / 255, data.train_labels
    torch.manual_seed(0)
    model = build_model(Part("model", {"_target_": "fedleak.models.LeNet"}), data.image_shape, data.classes, 0)
    steps = torch.optim.Adam(model.parameters(), lr=0.01)
    for batch in torch.randperm(len(labels))[:1280].view(40, 32):
        steps.zero_grad()
        torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        steps.step()
    drawn = torch.randperm(len(labels))[:40].view(10, 4)
    training = victims.observations[0].training
    sent = [client_update(model, images[b], labels[b], training, run=n) for n, b in enumerate(drawn)]
    truths = [Truth(n + 1, 0, images[b], labels[b]) for n, b in enumerate(drawn)]
    known = Knowledge(model, data.image_shape, data.classes, ThreatModel())
    trained = Captured(known, sent, truths)
    for defense in (Pruning(0.9), Masking(0.9)):
        assert accuracy(FromWhatIsLeft(batches=128), defense, trained) > 0.8
    tested = data.test_images[:200].float() / 255, data.test_labels[:200]
    informed = replace(trained, knowledge=replace(known, auxiliary=tested))
    assert accuracy(FromWhatIsLeft(batches=128), Pruning(0.9), informed) > 0.8
