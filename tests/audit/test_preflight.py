"""Checks before an attack: what is right passes, what is wrong is told, and what nobody said is unknown."""

from dataclasses import replace

import pytest
import torch

from fedleak.audit.preflight import CONSISTENT, CONTRADICTS, UNKNOWN, preflight
from fedleak.audit.statement import Statement


def check(clients, knowledge, **stated):
    statements = [replace(c.statement, **stated) for c in clients]
    return preflight([c.exchange for c in clients], knowledge, statements)


def verdicts(found):
    return {c.name: c.verdict for c in found.checks}


def words(found, name):
    return next(c.words for c in found.checks if c.name == name)


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"steps": 5},
        {"steps": 5, "momentum": 0.9},
        {"optimizer": "adam", "lr": 0.001},
        {"weight_decay": 0.01},
        {"payload": "gradient"},
        {"payload": "change"},
        {"norm": True, "steps": 2},
        {"batch_size": 8},
    ],
    ids=str,
)
def test_what_is_right_is_not_contradicted(made, client, knowledge):
    for seed in range(3):
        one = client(seed, **made)
        [found] = check([one], knowledge(made.get("norm", False)))
        assert CONTRADICTS not in verdicts(found).values(), found.checks
        assert found.observation is not None
        if found.counts is not None:
            assert list(found.counts) == one.counts


@pytest.mark.parametrize(
    ("made", "stated", "which"),
    [
        ({}, {"lr": 1.0}, "scale"),
        ({}, {"lr": 0.01}, "scale"),
        ({"steps": 5}, {"lr": 1.0}, "scale"),
        ({"steps": 5}, {"lr": 0.01}, "scale"),
        ({"optimizer": "adam", "lr": 0.001}, {"optimizer": "sgd"}, "optimiser"),
        ({"optimizer": "adam", "lr": 0.001, "steps": 5}, {"optimizer": "sgd"}, "optimiser"),
        ({"weight_decay": 0.01}, {"weight_decay": 0.0}, "optimiser"),
        ({"payload": "change"}, {"payload": "weights"}, "payload"),
        ({}, {"payload": "gradient"}, "payload"),
        ({"batch_size": 1, "steps": 40}, {"batch_size": 1, "steps": 1}, "steps"),
        ({"norm": True, "steps": 3}, {"steps": 1, "batch_size": None}, "steps"),
        ({}, {"optimizer": "adam"}, "optimiser"),
    ],
    ids=str,
)
def test_what_is_wrong_is_contradicted(made, stated, which, client, knowledge):
    for seed in range(3):
        [found] = check([client(seed, **made)], knowledge(made.get("norm", False)), **stated)
        assert verdicts(found)[which] == CONTRADICTS, found.checks
        assert found.verdict == CONTRADICTS


def test_momentum_left_out_is_mostly_noticed(client, knowledge):
    found = [check([client(s, steps=5, momentum=0.9)], knowledge(), momentum=0.0)[0].verdict for s in range(4)]
    assert found.count(CONTRADICTS) >= 3


def test_batchnorm_says_the_steps_where_nobody_does(client, knowledge):
    one = client(norm=True, steps=3, batch_size=16)
    [found] = check([one], knowledge(True), batch_size=None, epochs=None)
    assert (found.observation.training.local_steps, found.observation.training.batch_size) == (3, 16)
    assert "counted by BatchNorm" in words(found, "steps")


def test_nothing_stated_is_unknown_and_says_what_was_assumed(client, knowledge):
    one = client(examples=False)
    [found] = preflight([one.exchange], knowledge(), [Statement()])
    assert (found.verdict, found.observation) == (UNKNOWN, None)
    assert "how many samples" in found.why
    one = client()
    [found] = preflight([one.exchange], knowledge(), [Statement()])
    assert found.verdict == UNKNOWN
    assert found.assumed == ("one step an epoch",)


@pytest.mark.parametrize("told", [True, False])
def test_a_clipped_update_is_known_by_its_norm_and_its_scale_is_found(told, client, knowledge):
    clients = [client(seed, number=seed, clip=0.02) for seed in range(3)]
    if told:
        clients = [replace(clients[0], exchange=replace(clients[0].exchange, config={"clipping_norm": 0.02}))]
    for found, one in zip(check(clients, knowledge()), clients, strict=True):
        assert verdicts(found)["clip"] == CONSISTENT
        assert list(found.counts) == one.counts
        assert found.factor > 1


def test_an_unstated_learning_rate_is_found_too(client, knowledge):
    one = client(3)
    [found] = check([one], knowledge(), lr=None)
    assert list(found.counts) == one.counts


def test_noise_is_seen_and_measured(client, knowledge):
    for seed in range(3):
        [found] = check([client(seed, noise=0.003)], knowledge())
        assert found.noise == pytest.approx(0.003, rel=0.3)
        assert found.verdict == CONSISTENT


@pytest.mark.parametrize("stated", [None, "fc2.weight+fc2.bias"])
def test_a_head_that_stays_with_its_client_is_the_one_it_started_from(stated, client, knowledge):
    first = client(0)
    second = client(1, round=2)
    mine = {n: v.clone() for n, v in first.exchange.reply.items()}
    pull = {n: mine[n] - second.exchange.sent[n] for n in ("fc2.weight", "fc2.bias")}
    kept = {n: second.exchange.reply[n] + pull.get(n, 0) for n in mine}
    second = replace(second, exchange=replace(second.exchange, reply=kept))
    found = check([first, second], knowledge(), keeps=stated)[1]
    torch.testing.assert_close(found.observation.parameters["fc2.weight"], mine["fc2.weight"])
    assert "fc2.weight" in words(found, "state")


def test_tensors_that_are_numbered_frozen_extra_or_of_other_kinds_do_no_harm(client, knowledge):
    one = client(2)
    names = list(one.exchange.sent)
    numbered = replace(
        one.exchange,
        sent={str(i): one.exchange.sent[n].double() for i, n in enumerate(names)},
        reply={str(i): one.exchange.reply[n] for i, n in enumerate(names)},
    )
    wrapped = replace(one.exchange, reply={f"_module.{n}": v for n, v in reversed(one.exchange.reply.items())})
    more = replace(one.exchange, reply={**one.exchange.reply, "ema.step": torch.tensor(3), "fc9.weight": torch.ones(2)})
    for exchange in (numbered, wrapped, more):
        [found] = preflight([exchange], knowledge(), [one.statement])
        assert list(found.counts) == one.counts, found.checks
    frozen = {n: v for n, v in one.exchange.reply.items() if not n.startswith("conv")}
    [found] = preflight([replace(one.exchange, reply=frozen)], knowledge(), [one.statement])
    assert list(found.counts) == one.counts
    assert torch.equal(found.observation.update["conv1.weight"], one.exchange.sent["conv1.weight"])
    headless = {n: v for n, v in one.exchange.reply.items() if not n.startswith("fc2")}
    [found] = preflight([replace(one.exchange, reply=headless)], knowledge(), [one.statement])
    assert "not sent" in found.why


def test_half_precision_is_no_contradiction(client, knowledge):
    one = client(0)
    halved = {n: v.half() for n, v in one.exchange.reply.items()}
    [found] = preflight([replace(one.exchange, reply=halved)], knowledge(), [one.statement])
    assert verdicts(found).get("optimiser") != CONTRADICTS, found.checks


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"reply": {}, "masked": True}, "masked"),
        ({"error": "client error: boom"}, "client error: boom"),
        ({"reply": {"other": torch.ones(3)}}, "not this model's"),
    ],
)
def test_what_cannot_be_attacked_says_why(change, why, client, knowledge):
    one = client(0)
    [found] = preflight([replace(one.exchange, **change)], knowledge(), [one.statement])
    assert found.observation is None
    assert why in found.why
    same = replace(one.exchange, reply=dict(one.exchange.sent))
    [found] = preflight([same], knowledge(), [one.statement])
    assert found.why.startswith("empty")
    broken = {n: v * float("nan") for n, v in one.exchange.reply.items()}
    [found] = preflight([replace(one.exchange, reply=broken)], knowledge(), [one.statement])
    assert found.verdict == CONTRADICTS
