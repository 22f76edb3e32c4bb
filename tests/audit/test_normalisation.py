"""How clients normalise images: told by their updates where these tell it, and unknown where not."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedleak.audit.checks import CONSISTENT, CONTRADICTS, UNKNOWN
from fedleak.audit.made_up import made_up_images
from fedleak.audit.normalisation import PLAIN, look, usual, with_look
from fedleak.audit.preflight import preflight

HALF = ([0.5], [0.5])


@pytest.fixture(autouse=True)
def few_kinds(monkeypatch):
    """Enough for normalisations that differ by much, in one network for all tests."""
    torch.manual_seed(3)
    monkeypatch.setattr("fedleak.audit.normalisation.KINDS", 100)


def clients_of(client, knowledge, images_norm, count=2, **settings):
    """Clients on images like photographs, normalised so; images as the check itself makes none of."""
    torch.manual_seed(3)
    model = knowledge.model
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in images_norm)
    sent = {n: v.clone() for n, v in model.state_dict().items()}
    made = []
    for number in range(count):
        one = client(number, number=number, model=model, **settings)
        model.load_state_dict(sent)
        images = made_up_images(1, 32, (3, 32, 32), 50 + number)[0]
        images = (0.46 + 0.24 * (images - images.mean()) / images.std()).clamp(0, 1)  # as photographs mostly are
        labels = torch.repeat_interleave(torch.arange(10), torch.tensor(one.counts))
        cross_entropy(model((images - mean) / std), labels).backward()
        reply = {n: v.clone() for n, v in model.state_dict().items()}
        reply |= {n: sent[n] - 0.1 * p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        made.append(replace(one, exchange=replace(one.exchange, sent=sent, reply=reply)))
    return preflight([c.exchange for c in made], knowledge, [c.statement for c in made])


def test_what_was_stated_is_held_against_the_updates(client, knowledge):
    known = knowledge()
    checked = clients_of(client, known, HALF)
    assert look(checked, known.model, known, HALF, seed=0).check.verdict in (CONSISTENT, UNKNOWN)
    wrong = look(checked, known.model, known, PLAIN, seed=0)
    assert wrong.check.verdict == CONTRADICTS
    assert "0/1 (none) was stated" in wrong.check.words
    assert [p.verdict for p in with_look(checked, wrong)] == [CONTRADICTS] * 2
    unstated = look(checked, known.model, known, None, seed=0)
    assert unstated.check.verdict == UNKNOWN
    assert min(unstated.behind) == unstated.behind[usual(3).index(unstated.best)] == 0
    assert unstated.best != PLAIN


def test_batchnorms_statistics_are_looked_at_too_and_none_is_right_where_none_is(client, knowledge):
    known = knowledge(True)
    checked = clients_of(client, known, PLAIN, norm=True)
    assert look(checked, known.model, known, PLAIN, seed=0).check.verdict == CONSISTENT
    assert look(checked, known.model, known, usual(3)[-1], seed=0).check.verdict == CONTRADICTS


def test_looking_changes_nothing_and_a_withheld_scale_is_no_obstacle(client, knowledge):
    known = knowledge(True)
    checked = clients_of(client, known, PLAIN, norm=True, count=1)
    before = {name: value.clone() for name, value in checked[0].observation.start_buffers.items()}
    blind = replace(checked[0].observation.training, optimizer=None)
    unknown = [replace(p, observation=replace(p.observation, training=blind)) for p in checked]
    assert look(unknown, known.model, known, usual(3)[-1], seed=0).check.verdict == CONTRADICTS
    for name, value in before.items():
        assert torch.equal(checked[0].observation.start_buffers[name], value)


def test_where_an_update_cannot_tell_nothing_is_said(client, knowledge):
    known = knowledge()
    adam = client(0, optimizer="adam", lr=0.001)
    checked = preflight([adam.exchange], known, [adam.statement])
    assert look(checked, known.model, known, HALF, seed=0) is None
    assert with_look(checked, None) == checked


def test_made_up_images_are_images():
    for varied in (False, True):
        images = made_up_images(8, 3, (1, 9, 7), 0, varied=varied)
        assert images.shape == (8, 3, 1, 9, 7)
        assert float(images.min()) >= 0
        assert float(images.max()) <= 1
        assert torch.equal(images, made_up_images(8, 3, (1, 9, 7), 0, varied=varied))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_usual_ones_begin_with_what_was_stated(channels):
    stated = ([0.3], [0.9])
    assert usual(channels, stated)[0] == stated
    assert PLAIN in usual(channels)
    assert all(len(mean) in (1, channels) for mean, _ in usual(channels))
    assert usual(channels, HALF).count(HALF) == 1
