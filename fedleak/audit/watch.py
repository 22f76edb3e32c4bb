"""What an app's own clients do while they train, noted in this process: how they train, and the truth behind it.

How a client trains is in code that a server's operator usually wrote or can read, so that the attacker may know it. The
private images and labels are kept apart, for scores alone.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import Array, Message
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode

from fedleak.errors import UsageError


@dataclass
class Session:
    """One client's answer to one message.

    Attributes:
        message: id of the message.
        optimizer: name of the optimiser's class, None if none made a step.
        settings: its settings at the first step: ``lr``, ``momentum``, …
        steps: optimiser steps.
        batches: samples of each forward pass in training.
        image_shape: (C, H, W) of one input.
        kept: names of the model's tensors that the client started from otherwise than it was sent them.
        images, labels: the private inputs, as the model got them, and labels, pass by pass.
    """

    message: str
    optimizer: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    batches: list[int] = field(default_factory=list)
    image_shape: tuple[int, int, int] | None = None
    kept: list[str] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    @property
    def truth(self) -> tuple[Tensor | None, Tensor]:
        """Images ``[N, C, H, W]``, None where not every label has one, and labels ``[N]``; each sample once."""
        labels = torch.cat(self.labels) if self.labels else torch.empty(0, dtype=torch.int64)
        images = torch.cat(self.images) if self.images else None
        return (images if images is not None and len(images) == len(labels) else None), labels


class Watch:
    """Looks over the shoulder of clients that run in this process; pass `around` to a `LocalGrid`."""

    def __init__(self) -> None:
        self.sessions: list[Session] = []
        self.model: nn.Module | None = None
        self._lock = threading.RLock()

    @contextmanager
    def around(self, message: Message) -> Iterator[None]:
        """While one client answers; one at a time, since the hooks see all of a process."""
        sent = [array for record in message.content.array_records.values() for array in record.values()]
        with self.session(message.metadata.message_id, sent):
            yield

    @contextmanager
    def session(self, message: str, sent: Sequence[Array]) -> Iterator[None]:
        """While somebody trains who was sent these arrays; `message` is what the session is filed under."""
        with self._lock:
            session = Session(message)
            depth = 0

            def before(module: nn.Module, inputs: Any) -> None:
                nonlocal depth
                if depth == 0:
                    self._input(session, module, inputs, sent)
                depth += 1

            def after(module: nn.Module, inputs: Any, output: Any) -> None:
                nonlocal depth
                depth -= 1

            def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
                session.steps += 1
                if session.optimizer is None:
                    session.optimizer = _name(optimizer)
                    group = optimizer.param_groups[0]
                    session.settings = {k: v for k, v in group.items() if isinstance(v, bool | int | float | tuple)}

            hooks = [
                register_module_forward_pre_hook(before),
                register_module_forward_hook(after, always_call=True),
                register_optimizer_step_post_hook(stepped),
            ]
            try:
                with _Labels(session):
                    yield
            finally:
                for hook in hooks:
                    hook.remove()
                if session.steps or session.labels:
                    self.sessions.append(session)

    def _input(self, session: Session, module: nn.Module, inputs: Any, sent: Sequence[Array]) -> None:
        trains = torch.is_grad_enabled() and module.training and next(module.parameters(), None) is not None
        if not trains or not inputs or not isinstance(inputs[0], Tensor) or inputs[0].dim() != 4:
            return
        if self.model is None:
            self.model = bare_model(module)
        if not session.batches:
            session.kept = _kept(module, sent)
        session.batches.append(len(inputs[0]))
        session.image_shape = tuple(inputs[0].shape[1:])  # type: ignore[assignment]
        session.images.append(inputs[0].detach().cpu().clone())

    def require_model(self) -> nn.Module:
        """The model that clients trained.

        Raises:
            UsageError: none was seen.
        """
        if self.model is None:
            raise UsageError(
                "no client trained a torch model on images [B, C, H, W] in this process; tap the app's grid and name "
                "the model, fedleak audit CAPTURES --model package.module:Net"
            )
        return self.model


class _Labels(TorchFunctionMode):
    """Notes the targets of losses that are differentiated."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (functional.cross_entropy, functional.nll_loss) and torch.is_grad_enabled():
            logits = args[0] if args else kwargs.get("input")
            target = args[1] if len(args) > 1 else kwargs.get("target")
            wanted = isinstance(logits, Tensor) and logits.requires_grad
            if wanted and isinstance(target, Tensor) and target.dim() == 1 and not target.is_floating_point():
                self._session.labels.append(target.detach().cpu().clone().long())
        return function(*args, **kwargs)


def bare_model(module: nn.Module) -> nn.Module:
    """A copy of a model without what trainers wrap around it and hang onto it."""
    while isinstance(inner := getattr(module, "_module", getattr(module, "module", None)), nn.Module):
        module = inner
    module = copy.deepcopy(module).cpu()
    for part in module.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(part, name).clear()
    for parameter in module.parameters():
        parameter.grad = None
    return module


def _kept(module: nn.Module, sent: Sequence[Array]) -> list[str]:
    """Names of the parameters at the start of training that equal nothing of their shape that was sent."""
    arrays = [torch.from_numpy(array.numpy().copy()) for array in sent]
    buffers = {name for name, _ in module.named_buffers()}
    kept = []
    for name, value in module.state_dict().items():
        same = [array.to(value.dtype) for array in arrays if array.shape == value.shape]
        if name not in buffers and same and not any(torch.equal(value.cpu(), array) for array in same):
            kept.append(name.removeprefix("_module."))
    return kept


def _name(optimizer: Optimizer) -> str:
    """The optimiser's class, that within a wrapper's if it is wrapped."""
    inner = getattr(optimizer, "original_optimizer", None)
    return type(inner if isinstance(inner, Optimizer) else optimizer).__name__
