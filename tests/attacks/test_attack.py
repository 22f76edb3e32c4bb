"""Label inference and inversion together, and what is said before and after."""

import logging
from dataclasses import replace

import pytest
import torch

from fedleak.attacks import Attack, Knowledge, LabelsOnly, SecureSum, StopReason
from fedleak.attacks.inversion import MAP, GradientMatching
from fedleak.attacks.labels import IDLG, Random, Version1
from fedleak.attacks.store import ReconstructionStore
from fedleak.errors import UsageError
from fedleak.models import LeNet
from fedleak.threat import ThreatModel
from fedleak.training import SGD, Adam, LocalTraining

KNOWLEDGE = Knowledge(LeNet((1, 28, 28), 10), (1, 28, 28), 10)


def test_one_assumed_local_step_is_said(observe, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fedleak"), "propagate", True)  # the command line keeps it to itself
    observation, _, labels = observe(1)
    unknown = replace(observation, training=replace(observation.training, local_steps=None))
    attack = Attack(IDLG(), GradientMatching(max_evaluations=3, restarts=1))
    with caplog.at_level(logging.WARNING, "fedleak"):
        known, assumed = attack([observation, replace(unknown, client=1)], KNOWLEDGE)
    assert "1 of 2 updates: the number of local steps is withheld, one is assumed" in caplog.text
    assert "assumed" not in known.details
    assert assumed.details["assumed"] == "one local step"
    assert assumed.labels.tolist() == labels.tolist()


def test_a_run_reaches_both_parts_and_its_budget_the_inversion(observe):
    seen = {}

    class Labels(IDLG):
        def infer(self, observations, knowledge, run, *, candidates=1):
            seen["labels"] = run
            return super().infer(observations, knowledge, run, candidates=candidates)

    class Images(LabelsOnly):
        def invert(self, observations, guesses, knowledge, run):
            seen["images"] = run
            return super().invert(observations, guesses, knowledge, run)

    observation, _, _ = observe(1)
    [found] = Attack(Labels(), Images())([observation], KNOWLEDGE, seed=3, seconds=1.5)
    assert seen["labels"] is seen["images"]
    assert (seen["labels"].seed, seen["labels"].seconds, seen["labels"].device) == (3, 1.5, "cpu")
    assert (found.stop_reason, found.labels_only, found.failed) == (StopReason.LABELS_ONLY, True, False)
    assert f"{found.stop_reason}" == "labels_only"


def test_a_view_stands_between_the_captures_and_the_attack(observe, tmp_path):
    seen = [replace(observe(2, seed=0)[0], client=client) for client in range(4)]
    attack = Attack(Version1(), LabelsOnly(), view=SecureSum(2))
    store = ReconstructionStore(tmp_path)
    found = attack(seen, KNOWLEDGE, store=store)
    assert [(r.client, len(r.labels)) for r in found] == [(0, 4), (2, 4)]
    assert [r.client for r in store] == [0, 2]
    single = Attack(IDLG(), LabelsOnly(), view=SecureSum(2))
    with pytest.raises(UsageError, match="reads 1 sample an update, not 2"):
        single.check(ThreatModel(), LocalTraining(batch_size=1, local_steps=1))


def test_what_an_inversion_cannot_know_is_refused_before_any_work(observe):
    whole = LocalTraining("weights", 1, 1, optimizer=SGD(0.1))
    attack = Attack(Random(), GradientMatching())
    blind = ThreatModel(hyperparameters=False)
    attack.check(ThreatModel(), whole)
    attack.check(blind, replace(whole, payload="gradient"))
    with pytest.raises(UsageError, match=r"needs the learning rate.*threat\.hyperparameters=true"):
        attack.check(blind, whole)
    with pytest.raises(UsageError, match="do not tell after Adam"):
        attack.check(ThreatModel(), replace(whole, optimizer=Adam(0.1)))
    Attack(Random(), MAP()).check(ThreatModel(), replace(whole, optimizer=Adam(0.1)))  # goes through the optimiser
    with pytest.raises(UsageError, match="needs the learning rate"):
        Attack(Random(), MAP()).check(blind, whole)
    Attack(Random(), LabelsOnly()).check(blind, whole)
    observation, _, _ = observe(1, payload="weights")
    with pytest.raises(UsageError, match="needs the learning rate"):
        attack([replace(observation, training=whole.seen_by(blind))], KNOWLEDGE)


def test_unusable_updates_are_reported(observe):
    observation, _, _ = observe(1)
    broken, fine = Attack(IDLG(), LabelsOnly())(
        [replace(observation, error="client error: full"), observation], KNOWLEDGE
    )
    assert (broken.stop_reason, broken.failed) == ("client error: full", True)
    assert len(fine.labels) == 1
    assert torch.isnan(torch.tensor(broken.objective))
