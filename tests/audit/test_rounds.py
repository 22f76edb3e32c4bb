"""What a client's rounds tell together, and what is stated of all clients."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedleak.attacks.labels.counting import round_counts
from fedleak.audit.checks import CONTRADICTS
from fedleak.audit.findings import EXPOSED, Truth, examine
from fedleak.audit.preflight import preflight
from fedleak.audit.rounds import Reading, combined


def readings(true, error, rounds, fresh=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(rounds):
        drawn = torch.multinomial(true / true.sum(), int(true.sum()), replacement=True, generator=generator)
        of = drawn.bincount(minlength=len(true)) if fresh else true
        noise = error * torch.randn(len(true), generator=generator)
        noisy = round_counts((of + noise - noise.mean())[None].double(), true.sum()[None].long())[0]
        made.append(Reading(tuple(noisy.tolist()), error))
    return made


def test_rounds_of_the_same_samples_are_read_together_and_fresh_ones_are_not():
    true = torch.tensor([20.0, 9, 14, 30, 11, 16, 25, 8, 12, 15])
    for seed in range(5):
        both = combined(readings(true, 1.5, 4, seed=seed))
        assert both.error == pytest.approx(0.75)
        assert sum(both.counts) == 160
        off = (torch.tensor(both.counts) - true).square().mean().sqrt()
        assert off < 1.5
        assert combined(readings(true, 1.5, 4, fresh=True, seed=seed)) is None
    assert combined(readings(true, 1.5, 1)) is None
    assert combined(readings(true, 30.0, 3)) is None, "too blurred to tell"


def shuffled_rounds(client, knowledge, rounds=4):
    """A client that goes over the same 160 samples in another order each round, with momentum."""
    torch.manual_seed(0)
    model = knowledge.model
    first = client(0, batch_size=32, steps=5, lr=0.02, momentum=0.9)
    sent = {n: v.clone() for n, v in model.state_dict().items()}
    generator = torch.Generator().manual_seed(9)
    labels = torch.repeat_interleave(torch.arange(10), torch.tensor(first.counts))
    images = torch.rand(10, 3, 32, 32, generator=generator)[labels] - 0.5
    images += 0.3 * torch.randn(images.shape, generator=generator)
    made = []
    for number in range(rounds):
        model.load_state_dict(sent)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        order = torch.randperm(160, generator=generator)
        for part in order.split(32):
            optimizer.zero_grad()
            cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
        reply = {n: v.clone() for n, v in model.state_dict().items()}
        exchange = replace(first.exchange, round=number + 1, sent=sent, reply=reply, message=str(number))
        made.append(exchange)
        sent = {n: (v + 3 * sent[n]) / 4 for n, v in reply.items()}  # as the mean with three others
    return made, replace(first.statement, momentum=0.9), labels


def test_momentum_over_several_rounds_is_read_as_well_as_without(client, knowledge):
    known = knowledge()
    exchanges, stated, labels = shuffled_rounds(client, known)
    truths = {e.message: Truth(labels) for e in exchanges}
    checked = preflight(exchanges, known, [stated] * len(exchanges))
    assert all(p.check("state") is None for p in checked), "training on the same data again is not keeping a layer"
    found = examine(checked, known, seconds=0, truths=truths)
    alone = [examine([p], known, seconds=0, truths=truths)[0] for p in checked]
    assert {f.verdict for f in found} == {EXPOSED}
    assert len({f.counts for f in found}) == 1
    assert "4 rounds together" in found[0].notes[0]
    assert found[0].label_accuracy >= 0.975
    assert found[0].label_accuracy > sum(f.label_accuracy for f in alone) / len(alone)
    assert found[0].accuracy == pytest.approx(found[0].label_accuracy, abs=0.02)


def test_what_cannot_be_true_of_some_is_not_believed_of_the_others(client, knowledge):
    clients = [client(seed, number=seed, steps=5, lr=0.02, momentum=0.9) for seed in range(6)]
    stated = replace(clients[0].statement, momentum=0.0)
    found = preflight([c.exchange for c in clients], knowledge(), [stated] * 6)
    assert [p.check("scale") for p in found] == [CONTRADICTS] * 6
    alone = [preflight([c.exchange], knowledge(), [stated])[0].check("scale") for c in clients]
    assert set(alone) != {CONTRADICTS}, "by itself, not every update tells"
    right = preflight([c.exchange for c in clients], knowledge(), [c.statement for c in clients])
    assert all(p.check("scale") != CONTRADICTS for p in right)
