"""The ground truth of a simulation, kept apart: clients write it, only the evaluation opens it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fedleak import tensorfile
from fedleak.errors import UsageError


@dataclass(frozen=True)
class Truth:
    """The private samples behind one update.

    Attributes:
        round, client: which update.
        images: ``[T * B, C, H, W]`` float32 in [0, 1], local step by local step.
        labels: ``[T * B]`` int64.
        local_steps: T.
    """

    round: int
    client: int
    images: Tensor
    labels: Tensor
    local_steps: int = 1


class TruthStore:
    """A folder with one safetensors file an update. Never opened by an attack, never sent to the server."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def _path(self, round: int, client: int) -> Path:
        return self.folder / f"round-{round:05d}-client-{client:05d}.safetensors"

    def write(self, truth: Truth) -> None:
        """Keep what one client trained on in one round."""
        tensors = {"images": truth.images, "labels": truth.labels}
        tensorfile.save(self._path(truth.round, truth.client), tensors, {"local_steps": truth.local_steps})

    def load(self, round: int, client: int) -> Truth | None:
        """The truth of one update, or None if it was never kept; raises `UsageError` if the file is damaged."""
        path = self._path(round, client)
        if not path.exists():
            return None
        tensors, header = tensorfile.load(path)
        try:
            return Truth(round, client, tensors["images"], tensors["labels"], header["local_steps"])
        except KeyError as error:
            raise UsageError(f"{path}: not a ground-truth file, {error} is missing; restore it or remove it") from error
