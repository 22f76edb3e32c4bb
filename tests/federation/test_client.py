"""What leaves a client: what its defense lets through, and nothing else."""

from dataclasses import replace

import pytest
import torch

from fedleak.defenses import Defense
from fedleak.errors import UsageError
from fedleak.federation.client import train_once
from fedleak.federation.records import to_tensors
from fedleak.federation.scenario import build_scenario
from fedleak.setup import compose
from fedleak.truth import TruthStore


class InPlace(Defense):
    def apply(self, update, *, generator):
        for value in update.values():
            value.zero_()
        return update


class Forgets(Defense):
    def apply(self, update, *, generator):
        return dict(list(update.items())[1:])


class PerExample(Defense):
    """Notes how many samples it saw, and lets nothing of them into the step."""

    def __init__(self):
        self.seen = []

    def examples(self, gradients, *, generator):
        self.seen.append(len(next(iter(gradients.values()))))
        return {name: torch.zeros_like(value) for name, value in gradients.items()}


def scenario(defense, *overrides):
    made = build_scenario(compose(["federation.batch_size=3", *overrides]))
    return replace(made, defense=defense)


def sent(made, tmp_path):
    parameters, buffers = made.start()
    content = train_once(made, 0, 1, {**parameters, **buffers}, TruthStore(tmp_path))
    return to_tensors(content.array_records["arrays"]), parameters


@pytest.mark.parametrize(("federation", "per_sample"), [("fedsgd", False), ("fedsgd", True), ("fedavg", False)])
def test_a_defense_that_works_in_place_lets_nothing_else_through(federation, per_sample, tmp_path):
    made = scenario(InPlace(), f"federation={federation}", f"threat.per_sample_gradients={per_sample}".lower())
    update, start = sent(made, tmp_path)
    for name, value in start.items():
        assert torch.equal(update[name], value if federation == "fedavg" else torch.zeros_like(update[name]))


@pytest.mark.parametrize("federation", ["fedsgd", "fedavg"])
def test_a_defense_that_forgets_a_tensor_withholds_the_update(federation, tmp_path):
    with pytest.raises(UsageError, match="defense=Forgets left out"):
        sent(scenario(Forgets(), f"federation={federation}"), tmp_path)


def test_examples_are_defended_inside_every_step(tmp_path):
    defense = PerExample()
    update, start = sent(scenario(defense, "federation=fedavg", "federation.local_steps=2"), tmp_path)
    assert defense.seen == [3, 3]
    assert all(torch.equal(update[name], value) for name, value in start.items())


def test_weights_that_no_defense_touched_are_not_rounded(tmp_path):
    plain_update, _ = sent(scenario(Defense(), "federation=fedavg"), tmp_path)

    class Copies(Defense):
        def apply(self, update, *, generator):
            return {name: value.clone() for name, value in update.items()}

    copied, _ = sent(scenario(Copies(), "federation=fedavg"), tmp_path)
    assert all(torch.equal(plain_update[name], value) for name, value in copied.items())
