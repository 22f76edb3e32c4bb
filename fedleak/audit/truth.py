"""What was really in an update, noted by the client that sent it, for scores alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedleak import tensorfile
from fedleak.audit.findings import Truth
from fedleak.errors import UsageError


def note_truth(message: Any, labels: Tensor, images: Tensor | None = None, folder: str | Path = "truth") -> None:
    """Note what a client trains on, one line in its app, so that ``fedleak audit … --truth folder`` can score::

        fedleak.note_truth(msg, labels, images)

    Nothing is sent, and the audit's attacker never opens it.

    Args:
        message: the Flower message that the client is about to answer.
        labels: ``[N]``, whole numbers.
        images: ``[N, C, H, W]`` in [0, 1]; None leaves images without scores.
        folder: where to; a relative one counts from where the client's process runs.
    """
    tensors = {"labels": torch.as_tensor(labels).detach().cpu().long()}
    if images is not None:
        tensors["images"] = images.detach().cpu().float()
    tensorfile.save(Path(folder) / f"{message.metadata.message_id}.safetensors", tensors)


def read_truth(folder: Path) -> dict[str, Truth]:
    """What clients noted: message id -> truth.

    Raises:
        UsageError: there is nothing, or it is damaged.
    """
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        raise UsageError(f"--truth={folder}: holds no truth; have the clients call fedleak.note_truth(msg, labels)")
    found = {}
    for file in files:
        tensors, _ = tensorfile.load(file)
        if "labels" not in tensors:
            raise UsageError(f"{file}: holds no labels; remove it, or have the clients note it again")
        found[file.stem] = Truth(tensors["labels"], tensors.get("images"))
    return found
