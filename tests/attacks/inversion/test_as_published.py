"""``attack/inversion=as_published`` against the published procedure, written out with torch's own optimiser."""

import pytest
import torch

from fedleak.attacks import Knowledge
from fedleak.attacks.base import Run
from fedleak.attacks.inversion.starts import first_point
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
