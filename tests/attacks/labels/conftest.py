"""A plain client for label-inference tests: it trains for real, in loops, with nothing of the package's attacks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedleak.attacks.base import Knowledge
from fedleak.capture import Observation
from fedleak.models.lenet import LeNet
from fedleak.training import SGD, LocalTraining


def client_observation(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    payload: str = "gradient",
    steps: int = 1,
    lr: float = 0.1,
    grant_lr: bool = True,
    training_mode: bool = True,
    **fields: object,
) -> Observation:
    """What a client sends that trains `steps` plain SGD steps on consecutive equal slices of the data."""
    local = copy.deepcopy(model)
    start = {name: value.detach().clone() for name, value in local.named_parameters()}
    total = {name: torch.zeros_like(value) for name, value in start.items()}
    for part, part_labels in zip(images.chunk(steps), labels.chunk(steps), strict=True):
        loss = nn.functional.cross_entropy(local(part), part_labels)
        gradients = torch.autograd.grad(loss, list(local.parameters()))
        with torch.no_grad():
            for (name, value), gradient in zip(local.named_parameters(), gradients, strict=True):
                value -= lr * gradient
                total[name] += gradient
    update = total if payload == "gradient" else {k: v.detach().clone() for k, v in local.named_parameters()}
    known = {
        "payload": payload,
        "batch_size": len(images) // steps,
        "optimizer": SGD(lr) if grant_lr else None,
        "local_steps": steps,
        "training_mode": training_mode,
    }
    known |= {name: fields.pop(name) for name in set(known) & set(fields)}
    values = {"round": 1, "client": 0, "parameters": start, "update": update, "training": LocalTraining(**known)}
    return Observation(**(values | fields))  # type: ignore[arg-type]


def fresh_lenet(seed: int, classes: int = 10, uniform: bool = False, bias: bool = True) -> LeNet:
    """A small LeNet on 12×12 images, initialised from `seed`."""
    torch.manual_seed(seed)
    model = LeNet((1, 12, 12), classes)
    if not bias:
        model.fc = nn.Linear(model.fc.in_features, classes, bias=False)
    if uniform:
        for value in model.parameters():
            nn.init.uniform_(value, -0.5, 0.5)
    return model


def knowledge_of(model: nn.Module, classes: int = 10, **fields: object) -> Knowledge:
    """What the attacker holds about one of these federations."""
    return Knowledge(model, (1, 12, 12), classes, **fields)  # type: ignore[arg-type]


@pytest.fixture
def observe() -> Callable[..., Observation]:
    return client_observation


@pytest.fixture
def lenet() -> Callable[..., LeNet]:
    return fresh_lenet


@pytest.fixture
def knowing() -> Callable[..., Knowledge]:
    return knowledge_of
