"""The ground truth of a simulation, kept apart: clients write it, only the evaluation opens it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fedleak import files, shards, tensorfile
from fedleak.errors import UsageError
from fedleak.shards import Background


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
    """A folder with a growing file a round, to which each client adds its own; safetensors blobs, each sealed.

    Never opened by an attack, never sent to the server. Folders from before, with a file an update, are read too.
    """

    def __init__(self, folder: Path, writer: Background | None = None) -> None:
        """Args: folder; writer: writes in the background, and is flushed by whoever made it."""
        self.folder = Path(folder)
        self.writer = writer
        self._found: dict[int, tuple[int, dict[int, list[tuple[int, int]]]]] = {}

    def _shard(self, round: int) -> Path:
        return self.folder / f"round-{round:05d}.shard"

    def write(self, truth: Truth) -> None:
        """Keep what one client trained on in one round."""
        if self.writer is None:
            self._append(truth)
        else:
            self.writer.put_aside(lambda: self._append(truth), truth.images.nbytes)

    def _append(self, truth: Truth) -> None:
        said = {"round": truth.round, "client": truth.client, "local_steps": truth.local_steps}
        data = tensorfile.pack({"images": truth.images, "labels": truth.labels}, said)
        shards.append(self._shard(truth.round), data)

    def load(self, round: int, client: int) -> Truth | None:
        """The truth of one update, or None if it was never kept; raises `UsageError` if its file is damaged."""
        path = self._shard(round)
        places = self._places(round).get(client, []) if path.exists() else []
        if len(places) > 1:
            raise UsageError(f"{path}: holds client {client} twice; restore the file, or repeat the run")
        if places:
            data = files.read_bytes(path, *places[0])
        else:
            path = self.folder / f"round-{round:05d}-client-{client:05d}.safetensors"
            if not path.exists():
                return None
            data = files.read_bytes(path)
        tensors, header = tensorfile.parse(data, path)
        if places and (header.get("round"), header.get("client")) != (round, client):  # files of before say neither
            raise UsageError(f"{path}: is of another round or client; restore it, or repeat the run")
        try:
            truth = Truth(round, client, tensors["images"], tensors["labels"], header["local_steps"])
        except KeyError as error:
            raise UsageError(f"{path}: not a ground-truth file, {error} is missing; restore it or remove it") from error
        _check(truth, path)
        return truth

    def known(self) -> list[tuple[int, int]]:
        """(round, client) of all that is kept, sorted; raises `UsageError` where a file is damaged."""
        found = {(round, client) for round in self._rounds() for client in self._places(round)}
        for path in self.folder.glob("round-*-client-*.safetensors"):
            if numbers := re.fullmatch(r"round-(\d+)-client-(\d+)\.safetensors", path.name):
                found.add((int(numbers[1]), int(numbers[2])))
        return sorted(found)

    def _rounds(self) -> list[int]:
        names = [re.fullmatch(r"round-(\d+)\.shard", path.name) for path in self.folder.glob("round-*.shard")]
        return [int(name[1]) for name in names if name]

    def _places(self, round: int) -> dict[int, list[tuple[int, int]]]:
        """Client -> where in the round's file its blobs are: offset and size."""
        path = self._shard(round)
        size = path.stat().st_size
        if round not in self._found or self._found[round][0] != size:
            places: dict[int, list[tuple[int, int]]] = {}
            for client, begin, length in _blobs(path, size):
                places.setdefault(client, []).append((begin, length))
            self._found[round] = (size, places)
        return self._found[round][1]


def _blobs(path: Path, size: int) -> Iterator[tuple[int, int, int]]:
    """(client, offset, size) of each blob in a round's file; raises `UsageError` where they do not line up."""
    begin = 0
    with path.open("rb") as file:
        while begin < size:
            try:
                file.seek(begin)
                first = file.read(8)
                head = first + file.read(min(int.from_bytes(first, "little"), 2**20))
                length, header = tensorfile.describe(head)
                client = int(header["client"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UsageError(f"{path}: damaged at byte {begin}; restore it, or repeat the run") from error
            if length < 1 or begin + length > size:
                raise UsageError(f"{path}: cut short at byte {begin}; restore it, or repeat the run")
            yield client, begin, length
            begin += length


def _check(truth: Truth, path: Path) -> None:
    """Raise `UsageError` for what can be no private batch."""
    images, labels, steps = truth.images, truth.labels, truth.local_steps
    if images.dim() != 4 or labels.dim() != 1 or len(images) != len(labels) or not isinstance(steps, int) or steps < 1:
        raise UsageError(f"{path}: holds no private batch; restore it or remove it")
