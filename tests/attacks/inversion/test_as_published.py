"""``attack/inversion=as_published`` against the published procedure, written out with torch's own optimiser."""

from dataclasses import replace

import pytest
import torch

from fedleak.attacks import Knowledge
from fedleak.attacks.base import Run
from fedleak.attacks.inversion import LBFGS, AsPublished
from fedleak.attacks.inversion.starts import first_point
from fedleak.attacks.inversion.stopping import Evaluated
from fedleak.attacks.problem import pose
from fedleak.config import compose_config, plain
from fedleak.instantiate import instantiate
from fedleak.models import LeNet


def published(model, target, image, logits, evaluations):
    """The objective at each of the first evaluations of DLG (Zhu et al. 2019), as its code computes it."""
    image, logits = image.clone().requires_grad_(), logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([image, logits], lr=1)
    values = []

    def closure():
        optimizer.zero_grad()
        loss = -(torch.softmax(logits, -1) * torch.log_softmax(model(image), -1)).sum(-1).mean()
        gradient = torch.autograd.grad(loss, model.parameters(), create_graph=True)
        distance = sum(((a - b) ** 2).sum() for a, b in zip(gradient, target, strict=True))
        distance.backward()
        values.append(float(distance.detach()))
        return distance

    optimizer.step(closure)
    return values[:evaluations]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_first_steps_are_those_of_the_published_code(observe, seed):
    observation, _, _ = observe(seed=seed)
    model = LeNet((1, 28, 28), 10)
    model.load_state_dict(observation.parameters)
    budget = 15
    config = plain(compose_config(["attack=dlg", "attack/inversion=as_published", "attack.restarts=1"]))
    inversion = instantiate({**config["attack"]["inversion"], "max_evaluations": budget, "trace_every": 1}, "inversion")
    knowledge = Knowledge(model, (1, 28, 28), 10)
    [found] = inversion.invert([observation], [None], knowledge, Run())
    [problem] = pose([observation], [None], knowledge)
    image, logits = (v.float() for v in first_point(inversion.settings.start, problem, 0, (1, 28, 28), 10, seed=0))
    expected = published(model, list(observation.gradient().values()), image, logits, budget)
    assert len(expected) == budget
    assert [value for _, value in found.trace] == pytest.approx(expected, rel=2e-2)


def test_the_labels_of_the_last_step_are_kept_beside_those_of_the_best(observe):
    observation, _, labels = observe(batch_size=2)
    config = plain(compose_config(["attack=dlg", "attack/inversion=as_published", "attack.max_evaluations=20"]))
    inversion = instantiate(config["attack"]["inversion"], "inversion")
    [found] = inversion.invert([observation], [None], Knowledge(LeNet((1, 28, 28), 10), (1, 28, 28), 10), Run())
    assert len(found.details["last_labels"].split()) == len(labels)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_published_code_at_once_walks_its_path_and_stops_where_it_stops(observe, seed):
    observation, _, _ = observe(seed=seed)
    observation = replace(observation, **{
        name: {key: value.double() for key, value in getattr(observation, name).items()}
        for name in ("parameters", "update")
    })  # fmt: skip
    model = LeNet((1, 28, 28), 10).double()
    model.load_state_dict(observation.parameters)
    config = plain(compose_config(["attack=dlg", "attack/inversion=published_code", "attack.max_evaluations=21"]))
    chosen = {**config["attack"]["inversion"], "dtype": "float64", "trace_every": 1, "restarts": 1}
    inversion, knowledge = instantiate(chosen, "inversion"), Knowledge(LeNet((1, 28, 28), 10), (1, 28, 28), 10)
    [found] = inversion.invert([observation], [None], knowledge, Run())
    [problem] = pose([observation], [None], knowledge)
    image, logits = first_point(inversion.settings.start, problem, 0, (1, 28, 28), 10, seed=0)
    expected = published(model, list(observation.gradient().values()), image, logits, 20)
    assert [value for _, value in found.trace][:20] == pytest.approx(expected, rel=1e-6)


def evaluated(value, evaluations):
    x = torch.zeros(1, 1, 1, 2, 2)
    best = torch.tensor([min(value, 1.0)])
    number = torch.tensor([evaluations])
    return Evaluated(x, torch.tensor([value]), torch.zeros(1, 4), best, best <= 1, number, guarded=False)


def test_the_published_code_looks_every_twenty_evaluations_at_the_objective_there():
    rule = AsPublished(max_evaluations=100, tolerance=1e-6)
    state = rule.init(torch.zeros(1, 4))
    codes = [int(rule.judge(state, evaluated(1e-9 if n == 5 else 0.5 + n / 1000, n))) for n in range(1, 41)]
    assert set(codes) == {0}  # low in between, and not where it looks
    assert int(rule.judge(state, evaluated(1e-7, 41))) == 1
    assert int(rule.judge(state, evaluated(0.3, 100))) == 4
    assert int(rule.judge(state, evaluated(float("nan"), 50))) == 2


def test_a_start_that_torch_lets_rest_has_stalled():
    rule = AsPublished(max_evaluations=1000)
    state = rule.init(torch.zeros(1, 4))
    codes = [int(rule.judge(state, evaluated(0.7, n))) for n in range(1, 30)]
    assert codes.index(3) == 20
    flat, x = LBFGS(rests=True), torch.zeros(2, 4)
    gradient = torch.tensor([[1e-8] * 4, [1.0] * 4])
    moved = flat.step(flat.init(x), x, torch.ones(2), gradient, torch.zeros(2))
    assert moved[0].eq(0).all()
    assert moved[1].ne(0).all()
