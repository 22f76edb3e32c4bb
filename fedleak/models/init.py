"""Initialisations of the shared model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fedleak.errors import UsageError


def uniform(model: nn.Module) -> None:
    """Every parameter from U(−0.5, 0.5), as the public code of DLG and iDLG does (Zhu 2019; Zhao 2020).

    Made for the small LeNet: deep networks overflow or saturate under it.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5)


def default(model: nn.Module) -> None:
    """The initialisation that the model's own constructor gave it."""


INITIALISATIONS: dict[str, Callable[[nn.Module], None]] = {"uniform": uniform, "default": default}


def initialise(model: nn.Module, init: str) -> None:
    """Apply an initialisation of `INITIALISATIONS` in place, with torch's global random state.

    Raises:
        UsageError: `init` is unknown.
    """
    if init not in INITIALISATIONS:
        raise UsageError(f"model.init={init} is unknown; choose one of {', '.join(INITIALISATIONS)}")
    INITIALISATIONS[init](model)
