import torch

from fedleak.attacks.base import Run
from fedleak.attacks.labels import Fedleak
from fedleak.attacks.labels.bias import Bias
from fedleak.attacks.labels.counting import collect
from fedleak.attacks.labels.last_layer import find_last_layer
from fedleak.attacks.labels.llg import LLG
from fedleak.attacks.labels.posterior import models
from fedleak.attacks.labels.reader import Reader, per_class, train_and_read


def test_a_reader_treats_every_class_alike():
    torch.manual_seed(0)
    reader, values = Reader(5), torch.randn(3, 7, 5)
    order = torch.randperm(7)
    torch.testing.assert_close(reader(values)[:, order], reader(values[:, order]))
    torch.testing.assert_close(reader(values).sum(dim=1), torch.ones(3))


def test_a_reader_learns_what_no_line_can_say():
    """The class of the largest value, from its square."""
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(600, 6, 1, generator=generator)
    sign = torch.randint(2, size.shape, generator=generator) * 2 - 1
    shares = torch.nn.functional.one_hot(size[..., 0].argmax(dim=1), 6).double()
    read = train_and_read((size * sign)[:500], shares[:500], torch.ones(500), (size * sign)[500:], steps=300, seed=0)
    assert float((read.argmax(dim=1) == shares[500:].argmax(dim=1)).double().mean()) > 0.8


def test_two_methods_counts_are_among_the_readings(observe, lenet, knowing):
    model, total = lenet(1, uniform=True), 20
    labels = torch.randint(10, (total,), generator=torch.Generator().manual_seed(0))
    knowledge = knowing(model)
    evidence = collect([observe(model, torch.rand(total, 1, 12, 12), labels)], find_last_layer(knowledge))
    seen = next(models(evidence, knowledge, 0)).seen
    values = per_class(seen, 10, torch.full((10,), 0.1, dtype=torch.float64), total)[0]
    for column, method in ((5, LLG()), (6, Bias())):
        counts = method.count(evidence, knowledge, Run()).counts[0]
        assert (values[:, column] * total).round().long().tolist() == counts.tolist()


def test_a_doubtful_update_is_read_again_and_a_sure_one_is_not(monkeypatch, observe, lenet, knowing):
    asked = []

    def spy(evidence, knowledge, *, seed):
        asked.append(len(evidence.totals))
        return torch.full((len(evidence.totals), 10), 0.1, dtype=torch.float64)

    monkeypatch.setattr("fedleak.attacks.labels.fedleak.read_shares", spy)
    model = lenet(0)
    labels = torch.arange(20) % 10
    observation = observe(model, torch.rand(20, 1, 12, 12), labels)
    Fedleak().infer([observation], knowing(model), Run())
    assert asked == []
    guess = Fedleak(doubt=0.0).infer([observation], knowing(model), Run())[0]
    assert asked == [1]
    assert torch.bincount(guess.best, minlength=10).tolist() == [2] * 10
