"""Where to compute."""

from __future__ import annotations

import torch

from fedleak.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """``auto`` takes the GPU when there is one; raises `UsageError` for ``cuda`` without one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device=cuda: no CUDA device is available here; use device=cpu or device=auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
