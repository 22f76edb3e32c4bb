"""Small victims for the inversion tests: networks that L-BFGS inverts in a second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from fedleak.attacks.base import Knowledge, LabelGuess
from fedleak.capture import Observation
from fedleak.models.lenet import LeNet
from fedleak.training import LocalTraining

SHAPE = (1, 8, 8)
CLASSES = 5


def tiny_lenet(seed: int, shape: tuple[int, int, int] = SHAPE, classes: int = CLASSES) -> LeNet:
    """A LeNet with weights U(-0.5, 0.5), as in the DLG and iDLG papers."""
    torch.manual_seed(seed)
    model = LeNet(shape, classes)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def observe(
    model: nn.Module, images: Tensor, labels: Tensor, *, client: int = 0, dtype: torch.dtype = torch.float32
) -> Observation:
    """The gradient of the mean cross-entropy of this batch, as a server sees it."""
    model = model.to(dtype)
    loss = nn.functional.cross_entropy(model(images.to(dtype)), labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    return Observation(
        round=1,
        client=client,
        parameters={name: value.detach().clone() for name, value in model.named_parameters()},
        update=dict(zip(names, gradients, strict=True)),
        training=LocalTraining(batch_size=len(labels), local_steps=1),
    )


class Victims:
    """N observations, their label guesses, what the attacker knows, and the truth."""

    observe = staticmethod(observe)

    def __init__(
        self,
        count: int,
        *,
        batch: int = 1,
        shared: bool = False,
        shape: tuple[int, int, int] = SHAPE,
        classes: int = CLASSES,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        images: Tensor | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(count, batch, *shape, generator=generator)
        self.images = noise if images is None else images
        self.labels = torch.randint(classes, (count, batch), generator=generator).sort(1).values
        models = [tiny_lenet(seed if shared else seed + i, shape, classes) for i in range(count)]
        self.observations = [
            observe(model, images, labels, client=i, dtype=dtype)
            for i, (model, images, labels) in enumerate(zip(models, self.images, self.labels, strict=True))
        ]
        self.guesses: Sequence[LabelGuess | None] = [LabelGuess(y[None], torch.ones(1)) for y in self.labels]
        self.knowledge = Knowledge(models[0], shape, classes)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems this small are slower on more threads, much slower where other work keeps the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def victims() -> type[Victims]:
    """The class that makes victims."""
    return Victims
