"""What is held to be true of a client's training, and who says so."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedleak.audit.watch import Session, Watch
from fedleak.errors import UsageError
from fedleak.instantiate import locate
from fedleak.training import SGD, Adam, AdamW, ClientOptimizer

OPTIMIZERS: Mapping[str, type[ClientOptimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
PAYLOADS = ("weights", "change", "gradient")
"""What clients return: new weights, new weights minus those received, or a gradient."""


@dataclass(frozen=True)
class Statement:
    """How clients train, as far as somebody says so; None is unknown.

    Attributes:
        optimizer: ``sgd``, ``adam``, ``adamw``, or another that fedleak cannot follow.
        lr, momentum, nesterov, weight_decay: its settings.
        batch_size: samples of a step.
        epochs: how often a client goes over its data.
        steps: optimiser steps, all epochs together.
        payload: ``weights``, ``change`` or ``gradient``.
        eval_mode: whether clients train in eval mode.
        keeps: names of tensors that a client starts from as it left them, joined by ``+``.
        source: who says so: ``stated``, ``seen``, or nobody.
    """

    optimizer: str | None = None
    lr: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    weight_decay: float | None = None
    batch_size: int | None = None
    epochs: int | None = None
    steps: int | None = None
    payload: str | None = None
    eval_mode: bool | None = None
    keeps: str | None = None
    source: str = ""

    def optimiser(self, lr: float | None) -> ClientOptimizer | None:
        """The client's optimiser with that learning rate, plain SGD where nobody says more; None if unknown."""
        kind = OPTIMIZERS.get(self.optimizer or "sgd")
        if kind is None or lr is None:
            return None
        if kind is SGD:
            return SGD(lr, self.momentum or 0.0, bool(self.nesterov), self.weight_decay or 0.0)
        return kind(lr) if self.weight_decay is None else kind(lr, weight_decay=self.weight_decay)  # type: ignore[call-arg]


def parse(text: str, model: nn.Module, image_shape: tuple[int, int, int], classes: int) -> Statement:
    """What ``--client`` says: ``optimizer=sgd,lr=0.1,momentum=0.9,batch_size=32,epochs=1``, or the app's own training
    function, ``package.module:train``, which is run once on made-up images to see what it does; or both.

    Raises:
        UsageError: an unknown key, a value that is none, or a function that cannot be run so.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    settings = dict(_setting(word) for word in words if "=" in word)
    functions = [word for word in words if "=" not in word]
    if len(functions) > 1:
        raise UsageError(f"--client={text}: names several functions; name one, as package.module:train")
    stated = Statement(**settings, source="stated")
    if not functions:
        return stated
    session, made_up = _try(functions[0], stated, model, image_shape, classes)
    seen = by_session(session)
    # How many steps it makes depends on the data it is given, which were made up here, as other arguments may be.
    seen = replace(seen, steps=None, batch_size=None, source="stated")
    if "epochs" not in made_up:
        seen = replace(seen, epochs=max(1, round(session.steps / _BATCHES)))
    if "lr" in made_up:
        seen = replace(seen, lr=None)
    return replace(seen, **settings)


_BATCHES = 2
"""Batches of the made-up data."""


def _setting(word: str) -> tuple[str, Any]:
    key, _, value = word.partition("=")
    kinds = {f.name: f.type for f in fields(Statement) if f.name != "source"}
    if key not in kinds:
        raise UsageError(f"--client {word}: unknown key; known: {', '.join(kinds)}")
    kind = str(kinds[key]).split(" ")[0]
    try:
        made: Any = _KINDS[kind](value)
        if kind in ("float", "int") and (made < 0 or (made == 0 and key not in ("momentum", "weight_decay"))):
            raise ValueError
    except ValueError:
        raise UsageError(f"--client {word}: no value for {key}; give a positive {kind}") from None
    for name, choices in (("optimizer", tuple(OPTIMIZERS)), ("payload", PAYLOADS)):
        if key == name and made not in choices:
            raise UsageError(f"--client {word}: unknown; known: {', '.join(choices)}")
    return key, made


_KINDS: dict[str, Callable[[str], Any]] = {"float": float, "int": int, "str": str, "bool": lambda text: _bool(text)}


def _bool(value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ValueError
    return value.lower() == "true"


def _try(
    reference: str, stated: Statement, model: nn.Module, image_shape: tuple[int, int, int], classes: int
) -> tuple[Session, set[str]]:
    """Watch the app's own training function train a copy of the model on made-up images.

    Returns:
        What it did, and which of its arguments nobody stated.
    """
    function = locate(reference.replace(":", "."), "--client")
    if not callable(function):
        raise UsageError(f"--client={reference}: is no function; name the app's training function")
    size = stated.batch_size or 4
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(_BATCHES * size, *image_shape, generator=generator)
    labels = torch.randint(classes, (_BATCHES * size,), generator=generator)
    given: dict[str, Any] = {
        "net": copy.deepcopy(model),
        "loader": DataLoader(TensorDataset(images, labels), batch_size=size, collate_fn=_Batch.of),
        "epochs": stated.epochs or 1,
        "lr": stated.lr or 0.01,
        "device": torch.device("cpu"),
    }
    arguments = {}
    for name, parameter in inspect.signature(function).parameters.items():
        meant = _meant(name)
        if meant in given:
            arguments[name] = given[meant]
        elif parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            raise UsageError(
                f"--client={reference}: asks for {name}, which is none of net, loader, epochs, lr, device; name a "
                "function that takes those, such as one that calls it"
            )
    watch = Watch()
    try:
        with watch.session("made up", ()):
            function(**arguments)
    except Exception as error:
        raise UsageError(f"--client={reference}: failed on made-up images ({type(error).__name__}: {error})") from error
    if not watch.sessions or not watch.sessions[0].steps:
        raise UsageError(f"--client={reference}: made no step with a torch optimiser; state its settings instead")
    asked = {_meant(name) for name in arguments}
    return watch.sessions[0], {name for name in ("epochs", "lr") if name in asked and getattr(stated, name) is None}


class _Batch(list[Tensor]):
    """Images and labels of a batch, for functions that unpack it and for those that want its columns by name."""

    @classmethod
    def of(cls, samples: Sequence[tuple[Tensor, Tensor]]) -> _Batch:
        return cls([torch.stack([image for image, _ in samples]), torch.stack([label for _, label in samples])])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            key = int(any(part in key.lower() for part in ("label", "target", "class")) or key == "y")
        return super().__getitem__(key)


def _meant(name: str) -> str:
    """Which of (net, loader, epochs, lr, device) an argument's name stands for."""
    plain = name.lower().replace("_", "")
    if "loader" in plain or plain in ("data", "trainset", "dataset"):
        return "loader"
    if plain in ("net", "model", "network"):
        return "net"
    if "epoch" in plain:
        return "epochs"
    return "lr" if plain in ("lr", "learningrate") else plain


def by_session(session: Session) -> Statement:
    """What a client that ran in this process was seen doing."""
    name = (session.optimizer or "").lower() or None
    settings = session.settings
    batch = max(session.batches, default=None)
    return Statement(
        optimizer=name,
        lr=settings.get("lr"),
        momentum=settings.get("momentum", 0.0),
        nesterov=settings.get("nesterov", False),
        weight_decay=settings.get("weight_decay", 0.0),
        batch_size=batch,
        steps=session.steps or None,
        epochs=None,
        eval_mode=False,
        keeps="+".join(session.kept) or None,
        source="seen",
    )
