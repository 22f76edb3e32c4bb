"""Reconstructions on disk, written one by one as they finish, so that a killed attack goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fedleak import tensorfile
from fedleak.attacks.results import Reconstruction
from fedleak.errors import UsageError


class ReconstructionStore:
    """A folder with one safetensors file a reconstruction."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def _path(self, round: int, client: int) -> Path:
        return self.folder / f"round-{round:05d}-client-{client:05d}.safetensors"

    def write(self, r: Reconstruction) -> None:
        """Keep one reconstruction."""
        header = {
            "round": r.round,
            "client": r.client,
            "objective": r.objective,
            "evaluations": r.evaluations,
            "seconds": r.seconds,
            "stop_reason": r.stop_reason,
            "restarts": r.restarts,
            "trace": r.trace,
            "snapshots": [evaluations for evaluations, _ in r.snapshots],
            "details": r.details,
        }
        tensors = {"images": r.images, "labels": r.labels}
        if r.snapshots:
            tensors["snapshots"] = torch.stack([images for _, images in r.snapshots])
        tensorfile.save(self._path(r.round, r.client), tensors, header)

    def load(self, round: int, client: int) -> Reconstruction | None:
        """One reconstruction, or None if it is not finished; raises `UsageError` if its file is damaged."""
        path = self._path(round, client)
        if not path.exists():
            return None
        found = self._read(path)
        if (found.round, found.client) != (round, client):
            raise UsageError(f"{path}: is of another update; remove it, or restore it")
        return found

    def __iter__(self) -> Iterator[Reconstruction]:
        return (self._read(path) for path in sorted(self.folder.glob("round-*.safetensors")))

    @staticmethod
    def _read(path: Path) -> Reconstruction:
        tensors, header = tensorfile.load(path)
        try:
            return ReconstructionStore._made(tensors, header)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path}: holds no reconstruction ({error}); remove it, or restore it") from error

    @staticmethod
    def _made(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> Reconstruction:
        header["trace"] = [(int(evaluations), float(objective)) for evaluations, objective in header["trace"]]
        # Files from before snapshots were kept have none.
        header["snapshots"] = list(zip(header.get("snapshots", []), tensors.pop("snapshots", []), strict=True))
        return Reconstruction(images=tensors["images"], labels=tensors["labels"], **header)


def load_reconstructions(folder: Path) -> list[Reconstruction]:
    """All reconstructions of a run directory, or of an ``attacks/NAME`` folder of one, by round and client.

    Returns:
        An empty list where `folder` has no ``summary.json`` that says where they are.
    """
    try:
        where = json.loads((Path(folder) / "summary.json").read_text())["reconstructions"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return list(ReconstructionStore(Path(folder) / where))
