"""Clients of many kinds for the audit's tests: plain PyTorch, as users write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedleak.attacks.base import Knowledge
from fedleak.audit.statement import Statement
from fedleak.audit.wire import Exchange


class Net(nn.Module):
    """A small convolutional network, as tutorials have them."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 84)
        self.fc2 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(self.norm(self.conv1(x)).relu(), 2)
        x = torch.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


@dataclass
class Client:
    """What one client was sent, did, and returned."""

    exchange: Exchange
    counts: list[int]
    statement: Statement


def images_of(labels: Tensor, generator: torch.Generator) -> Tensor:
    """``[B, 3, 32, 32]`` in [0, 1], a pattern a class and noise."""
    patterns = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    images = nn.functional.interpolate(patterns[labels], size=32, mode="bilinear")
    return (images + 0.15 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def train_client(
    seed: int = 0,
    *,
    batch_size: int = 32,
    steps: int = 1,
    lr: float = 0.1,
    optimizer: str = "sgd",
    payload: str = "weights",
    norm: bool = False,
    model: nn.Module | None = None,
    round: int = 1,
    number: int = 0,
    examples: bool = True,
    clip: float | None = None,
    noise: float = 0.0,
    **settings: float,
) -> Client:
    """A client trains on one epoch of made-up images; returns what its server sees, and the truth."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    model = Net(norm) if model is None else model
    sent = {name: value.clone() for name, value in model.state_dict().items()}
    labels = torch.randint(10, (batch_size * steps,), generator=generator)
    images = (images_of(labels, generator) - 0.5) / 0.5
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    made = kinds[optimizer](model.parameters(), lr=lr, **settings)
    gradient = None
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        made.zero_grad()
        cross_entropy(model(x), y).backward()
        gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
        made.step()
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    size = sum(float((trained[n] - sent[n]).double().square().sum()) for n in names) ** 0.5
    for name in names:
        change = trained[name] - sent[name]
        if clip is not None:
            change = change * min(1.0, clip / size)
        change = change + noise * torch.randn(change.shape, generator=generator)
        trained[name] = sent[name] + change if clip is not None or noise else trained[name]
    reply = trained
    if payload == "change":
        reply = {name: trained[name] - sent[name] for name in names}
    elif payload == "gradient":
        reply = gradient
    clear = {"metrics": {"num-examples": len(labels)}} if examples else {}
    exchange = Exchange(round, str(number), number, sent, reply, {}, clear)
    stated = Statement(
        optimizer=optimizer, lr=lr, batch_size=batch_size, epochs=1, payload=payload, source="stated", **settings
    )
    return Client(exchange, labels.bincount(minlength=10).tolist(), stated)


@pytest.fixture
def client() -> Callable[..., Client]:
    """`train_client`."""
    return train_client


@pytest.fixture
def knowledge() -> Callable[..., Knowledge]:
    """What the attacker holds of `Net`."""

    def make(norm: bool = False) -> Knowledge:
        return Knowledge(Net(norm), (3, 32, 32), 10)

    return make
