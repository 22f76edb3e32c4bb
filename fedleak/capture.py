"""The folder in which an attacker keeps what it observes (`CaptureStore`)."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedleak import files, shards, tensorfile
from fedleak.capture_index import digest, read_row, write_row
from fedleak.errors import UsageError
from fedleak.observation import Observation as Observation
from fedleak.observation import same_tensors
from fedleak.shards import Background
from fedleak.threat import ThreatModel
from fedleak.training import SGD, ClientOptimizer, LocalTraining, Tensors, known_optimizer, optimizer_node

log = logging.getLogger("fedleak")

FORMAT = 3
"""Of the captures on disk: 1 knew no epochs, no optimiser but plain SGD, and did not say its number; 1 and 2 had a file
an update."""


@dataclass(frozen=True)
class CaptureInfo:
    """What the attacker knows about the federation as a whole, kept in the capture store's `info.json`.

    Attributes:
        threat: what was granted while capturing; what was withheld was never written.
        image_shape: (C, H, W) of one private image, None if unknown.
        classes: number of classes, None if unknown.
        training_mode: whether clients run the model in train mode.
    """

    threat: ThreatModel = field(default_factory=ThreatModel)
    image_shape: tuple[int, int, int] | None = None
    classes: int | None = None
    training_mode: bool = True


class CaptureStore:
    """A folder of observations: a growing file a round, `index.jsonl` with a line an observation, and `info.json`.

    A round's file holds each distinct model that was sent once, whoever it was sent to, and every update, as
    safetensors blobs one after the other; the index says where each begins. Blobs, index lines and `info.json` carry a
    SHA-256, and a finished store says how many lines there are, so that a truncated or altered capture is noticed. Only
    what the threat model grants is ever written.

    Example:
        >>> store = CaptureStore.create(Path("captures"), CaptureInfo())
        >>> store.write(observation)
        >>> observations = CaptureStore.open(Path("captures")).load()

    Args:
        folder, info: as of `create` and `open`, which make stores.
        written: the format of what is there already.
        sealed: how many rows there are and their SHA-256, of a finished store.
        dtype: of updates on disk, None for as they were sent. Of new weights it is their change that is kept.
    """

    def __init__(
        self,
        folder: Path,
        info: CaptureInfo,
        *,
        written: int = FORMAT,
        sealed: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.info = info
        self.dtype = dtype
        self._written = written
        self._sealed = sealed
        self._sent: list[_Sent] = []
        self._lines: list[str] = []
        self._count = 0
        self.writer = Background()

    @classmethod
    def create(cls, folder: Path, info: CaptureInfo, *, dtype: torch.dtype | None = None) -> CaptureStore:
        """Start an empty store; raises `UsageError` if `folder` already holds captures."""
        folder = Path(folder)
        if (folder / "index.jsonl").exists():
            raise UsageError(f"{folder}: holds captures already; name another folder, or move these away")
        store = cls(folder, info, dtype=dtype)
        store._write_info()
        files.write_atomically(folder / "index.jsonl", b"")
        return store

    @classmethod
    def open(cls, folder: Path) -> CaptureStore:
        """Open an existing store; raises `UsageError` if there is none, or its `info.json` is damaged or too new."""
        folder = Path(folder)
        if not (folder / "index.jsonl").is_file():
            raise UsageError(f"{folder}: no captures here; name the folder of a run that kept some")
        try:
            info = json.loads((folder / "info.json").read_text())
            written, check = info.pop("format", 1), info.pop("sha256", None)
            if isinstance(written, bool) or not isinstance(written, int) or written > FORMAT:
                raise UsageError(
                    f"{folder / 'info.json'}: format {written}, and this fedleak reads up to {FORMAT}; use a newer one"
                )
            if written >= 3 and check != digest(info):
                raise ValueError("altered since it was written")
            sealed, shape = info.pop("sealed", None), info["image_shape"]
            info = CaptureInfo(
                **{**info, "threat": ThreatModel(**info["threat"]), "image_shape": tuple(shape) if shape else None}
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"{folder / 'info.json'}: damaged ({error}); restore it, or repeat the run") from error
        return cls(folder, info, written=written, sealed=sealed)

    @classmethod
    def go_on(cls, folder: Path, *, dtype: torch.dtype | None = None) -> CaptureStore:
        """Open a store to add to it, which whoever wrote it did not finish; raises `UsageError` as `open` does."""
        found = cls.open(folder)
        if found._written < FORMAT:
            raise UsageError(f"{folder}: captures of an earlier format cannot be added to; repeat the run")
        store = cls(folder, found.info, dtype=dtype)
        store._count = len(found.rows())
        return store

    @property
    def complete(self) -> bool:
        """Whether whoever wrote it said that nothing is missing."""
        return self._sealed is not None

    def _write_info(self) -> None:
        said: dict[str, Any] = asdict(self.info)
        if self._sealed is not None:
            said["sealed"] = self._sealed
        said = json.loads(json.dumps(said))
        whole = {"format": FORMAT, **said, "sha256": digest(said)}
        files.write_atomically(self.folder / "info.json", json.dumps(whole, indent=2).encode())

    def write(self, observation: Observation) -> None:
        """Add one observation, and wait until it is on disk."""
        self.put(observation)
        self.flush()

    def put(self, observation: Observation) -> None:
        """Add one observation, written in the background until `flush`.

        Its index line is written last, so that a killed run leaves no half observation.

        Raises:
            FedleakError: an earlier one could not be written.
        """
        sent = self._start(observation)
        size = sum(value.nbytes for value in observation.update.values())
        self.writer.put(lambda: self._add(observation, sent), size)

    def _kept(self, o: Observation) -> Mapping[str, Tensor]:
        """An update as it is stored: of new weights in fewer bits their change, which would else be lost."""
        if self.dtype is None or o.error is not None:
            return o.update
        if o.training.payload == "weights":
            return {name: (value - o.parameters[name]).to(self.dtype) for name, value in o.update.items()}
        return {name: value.to(self.dtype) for name, value in o.update.items()}

    def _add(self, o: Observation, sent: _Sent) -> None:
        """In the background: an observation's blob, and its index line among those to be written."""
        data, path = tensorfile.pack_unsealed(self._granted(o)), self._shard(o.round)
        begin = shards.append(path, data)
        row = self._said(o) | {
            "start_file": path.name,
            "start_offset": sent.blob.begin,
            "start_size": sent.blob.size,
            "start_sha256": sent.blob.sha256,
            "update_file": path.name,
            "update_offset": begin,
            "update_size": len(data),
            "update_sha256": hashlib.sha256(data).hexdigest(),
            "row": self._count,
        }
        self._count += 1
        self._lines.append(write_row(row))

    def _granted(self, o: Observation) -> dict[str, Tensor]:
        """The tensors of an observation that the threat model lets be written."""
        tensors = {f"update/{k}": v for k, v in self._kept(o).items()} if o.error is None else {}
        if self.info.threat.buffers:
            tensors |= {f"buffers/{k}": v for k, v in o.buffers.items()}
        if self.info.threat.labels and o.labels is not None:
            tensors["labels"] = o.labels
        return tensors

    def _said(self, o: Observation) -> dict[str, Any]:
        """What the index says of an observation, beside where it is."""
        training = o.training.seen_by(self.info.threat)
        return {
            "round": o.round,
            "client": o.client,
            "clients": list(o.clients),
            "payload": training.payload,
            "batch_size": training.batch_size,
            "lr": training.lr,
            "local_steps": training.local_steps,
            "epochs": training.epochs,
            "optimizer": None if training.optimizer is None else optimizer_node(training.optimizer),
            "per_sample": training.per_sample,
            "proximal": training.proximal,
            "error": o.error,
            "change": self.dtype is not None and training.payload == "weights",
        }

    def _shard(self, round: int) -> Path:
        return self.folder / f"round-{round:05d}.shard"

    def _start(self, o: Observation) -> _Sent:
        """Where the model that `o` started from is kept; the first time a round sends it, it is written."""
        self._sent = [sent for sent in self._sent if sent.round == o.round]
        for sent in self._sent:
            if same_tensors(sent.parameters, o.parameters) and same_tensors(sent.buffers, o.start_buffers):
                return sent
        start = {f"parameters/{k}": v for k, v in o.parameters.items()}
        start |= {f"buffers/{k}": v for k, v in o.start_buffers.items()}
        data = tensorfile.pack_unsealed(start)
        sent = _Sent(o.round, o.parameters, o.start_buffers, _Blob(size=len(data)))

        def write() -> None:
            sent.blob.begin = shards.append(self._shard(o.round), data)
            sent.blob.sha256 = hashlib.sha256(data).hexdigest()

        self.writer.put(write, len(data))
        self._sent.append(sent)
        return sent

    def end_round(self) -> None:
        """Have the index lines of all that was `put` written after it, without waiting for that."""
        self.writer.put(self._write_lines)

    def _write_lines(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            shards.append(self.folder / "index.jsonl", ("\n".join(lines) + "\n").encode())

    def afterwards(self, job: Callable[[int], object], size: int = 0) -> None:
        """Have something done in the background when all that was `put` is on disk.

        Args:
            job: is told how many lines the index has.
            size: bytes that it holds.
        """
        self.end_round()
        self.writer.put(lambda: job(self._count), size)

    def flush(self) -> None:
        """Wait until all that was `put` is on disk; raises `FedleakError` if it cannot be."""
        self.end_round()
        self.writer.flush()

    def close(self) -> None:
        """Flush, and say in `info.json` that nothing is missing."""
        self.flush()
        index = (self.folder / "index.jsonl").read_bytes()
        self._sealed = {"rows": self._count, "sha256": hashlib.sha256(index).hexdigest()}
        self._write_info()

    def rows(self) -> list[dict[str, Any]]:
        """The index, a dict an observation, sorted by round and client.

        Raises:
            UsageError: a line is damaged, doubled or missing.
        """
        path = self.folder / "index.jsonl"
        data = files.read_bytes(path)
        if self._written >= 3 and self._sealed is None and data[-1:] not in (b"", b"\n"):
            log.warning("%s: its last line is half written, as by a run that was killed; left out", path)
            data = data[: data.rfind(b"\n") + 1]
        rows, seen = [], set[tuple[int, int]]()
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            row = read_row(line, None if self._written < 3 else number - 1)
            if row is None:
                raise UsageError(f"{path}: line {number} is damaged; restore the file, or remove it from there on")
            if (row["round"], row["client"]) in seen:
                raise UsageError(f"{path}: line {number} is there twice; restore the file, or remove one")
            seen.add((row["round"], row["client"]))
            rows.append(row)
        if self._sealed is not None and self._sealed != {"rows": len(rows), "sha256": hashlib.sha256(data).hexdigest()}:
            raise UsageError(
                f"{path}: altered since the run ended, which counted {self._sealed.get('rows')} lines; restore the file"
            )
        return sorted(rows, key=lambda row: (row["round"], row["client"]))

    def load(
        self, rows: Sequence[Mapping[str, Any]] | None = None, *, threat: ThreatModel | None = None
    ) -> list[Observation]:
        """The observations of `rows` (all if None), in order; those sent the same parameters share the tensors.

        Args:
            rows: rows of `rows()`.
            threat: a narrower threat model than the one captured under; what it withholds is left out.

        Raises:
            UsageError: a file is missing, truncated or altered, or `threat` grants what was never captured.
        """
        threat = threat or self.info.threat
        for grant in threat.granted:
            # Auxiliary data is not captured from the wire, so it may be granted later.
            if grant != "auxiliary_data" and not getattr(self.info.threat, grant):
                raise UsageError(f"threat.{grant}=true: {self.folder} was captured without it; repeat the run with it")
        if self.info.threat.view not in ("updates", threat.view):
            raise UsageError(
                f"threat.view={threat.view}: {self.folder} holds what threat.view={self.info.threat.view} "
                "shows; repeat the run with it"
            )
        starts: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        observations = []
        for row in self.rows() if rows is None else rows:
            if row["start_sha256"] not in starts:
                tensors = self._blob(row, "start")
                starts[row["start_sha256"]] = (under(tensors, "parameters/"), under(tensors, "buffers/"))
            parameters, start_buffers = starts[row["start_sha256"]]
            tensors = self._blob(row, "update")
            observations.append(
                Observation(
                    round=row["round"],
                    client=row["client"],
                    parameters=parameters,
                    update=self._whole(under(tensors, "update/"), parameters, row),
                    training=self._training(row).seen_by(threat),
                    start_buffers=start_buffers,
                    buffers=under(tensors, "buffers/") if threat.buffers else {},
                    labels=tensors.get("labels") if threat.labels else None,
                    clients=tuple(row.get("clients", ())),
                    error=row["error"],
                )
            )
        return observations

    def _blob(self, row: Mapping[str, Any], kind: str) -> dict[str, Tensor]:
        """The tensors of a row's ``start`` or ``update``; captures before format 3 have a file for each."""
        name = row[f"{kind}_file"]
        if not re.fullmatch(r"[\w-][\w.-]*", name):  # none but the store's own files are opened
            raise UsageError(f"{self.folder / 'index.jsonl'}: {name!r} is no file of this store; restore the line")
        path = self.folder / name
        data = files.read_bytes(path, row.get(f"{kind}_offset", 0), row.get(f"{kind}_size"))
        return tensorfile.parse(data, path, sha256=row[f"{kind}_sha256"])[0]

    def _whole(self, update: dict[str, Tensor], parameters: Mapping[str, Tensor], row: Mapping[str, Any]) -> Tensors:
        """An update as it was sent, of one that may have been stored as a change or in fewer bits."""
        if row["error"] is not None:
            return update
        try:
            full = {name: value.to(parameters[name].dtype) for name, value in update.items()}
            return {n: parameters[n] + value for n, value in full.items()} if row.get("change") else full
        except (KeyError, RuntimeError) as error:
            raise UsageError(f"{self.folder}: the update of {row['client']} fits no model; repeat the run") from error

    def _training(self, row: Mapping[str, Any]) -> LocalTraining:
        """How a row says that its client trained; rows of format 1 are of plain SGD for one epoch."""
        optimizer: ClientOptimizer | None = None if row["lr"] is None else SGD(row["lr"])
        if row.get("optimizer") is not None:
            target = str(row["optimizer"].get("_target_"))
            kind = known_optimizer(target)
            if kind is None:
                raise UsageError(
                    f"{self.folder / 'index.jsonl'}: {target} is no ClientOptimizer that is known here, and what a "
                    "capture names is not imported; import its module before loading, or restore the line"
                )
            try:
                optimizer = kind(**{name: value for name, value in row["optimizer"].items() if name != "_target_"})
            except Exception as error:  # a class of anyone's, given what a file says
                raise UsageError(f"{self.folder / 'index.jsonl'}: {target} refuses its line: {error}") from error
        return LocalTraining(
            row["payload"],
            row["batch_size"],
            row["local_steps"],
            row.get("epochs", 1),
            optimizer,
            self.info.training_mode,
            row["per_sample"],
            row.get("proximal", 0.0),
        )


@dataclass
class _Blob:
    """Where something is in its file, known once it is written."""

    size: int
    begin: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class _Sent:
    """A model that a round sent, and where it is."""

    round: int
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    blob: _Blob


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
