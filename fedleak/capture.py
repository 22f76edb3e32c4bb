"""What the attacker holds about one update (`Observation`) and the folder it keeps them in (`CaptureStore`)."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedleak import tensorfile
from fedleak.errors import UsageError
from fedleak.threat import ThreatModel
from fedleak.training import SGD, ClientOptimizer, LocalTraining, Tensors

FORMAT = 2
"""Of the captures on disk: 1 knew no epochs, no optimiser but plain SGD, and did not say its number."""


@dataclass(frozen=True)
class Observation:
    """One client's update as the server saw it, and what the threat model lets the attacker know about it.

    Attributes:
        round: the server round, from 1.
        client: the client's partition id (or its position in a federation that does not tell).
        parameters: name -> tensor, the trainable parameters the client started from.
        update: name -> tensor, what the client sent back, same names and shapes, with a leading ``[B]`` where the
            training is `per_sample`; what it is, `training.payload` says. Empty where only models are seen.
        training: how the client trained, as far as it is known.
        start_buffers: name -> tensor, the model's buffers as the server sent them (the server always knows them).
        buffers: name -> tensor, the buffers the client returned; empty if withheld or there are none.
        labels: ``[B * local_steps]`` int64 sorted ascending, only if the threat model grants them.
        clients: of a sum of several clients' updates, whose they are, `client` first; empty for one client's own.
        error: why the update is unusable (a client error, NaN, wrong shapes), None if it is fine.
    """

    round: int
    client: int
    parameters: Mapping[str, Tensor]
    update: Mapping[str, Tensor]
    training: LocalTraining = field(default_factory=LocalTraining)
    start_buffers: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    clients: tuple[int, ...] = ()
    error: str | None = None

    @property
    def sign(self) -> int:
        """See `LocalTraining.sign`."""
        return self.training.sign

    @property
    def scale(self) -> float | None:
        """See `LocalTraining.scale`."""
        return self.training.scale

    def gradient(self) -> Tensors:
        """The mean gradient over the client's local steps, see `LocalTraining.mean_gradient`."""
        return self.training.mean_gradient(self.parameters, self.update)


def find_fault(
    update: Mapping[str, Tensor], parameters: Mapping[str, Tensor], *, per_sample: bool = False
) -> str | None:
    """Why `update` cannot be an update of `parameters`: a missing name, a wrong shape, a value that is not finite."""
    missing = sorted(set(parameters) - set(update))
    if missing:
        return f"missing tensor {missing[0]}"
    for name, value in update.items():
        if name not in parameters:
            return f"unknown tensor {name}"
        shape = value.shape[1:] if per_sample else value.shape
        if shape != parameters[name].shape:
            return f"wrong shape: {name} is {list(shape)}, expected {list(parameters[name].shape)}"
        if not torch.isfinite(value).all():
            return f"not finite: {name}"
    return None


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of named tensors are equal to the bit."""
    return a is b or (a.keys() == b.keys() and all(v is b[k] or torch.equal(v, b[k]) for k, v in a.items()))


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
    """A folder of observations: safetensors files, `index.jsonl` with a line an observation, and `info.json`.

    Each distinct model of a round is stored once, whoever it was sent to. Every file's SHA-256 stands in the index, so
    that a truncated or altered capture is noticed. Only what the threat model grants is ever written.

    Example:
        >>> store = CaptureStore.create(Path("captures"), CaptureInfo())
        >>> store.write(observation)
        >>> observations = CaptureStore.open(Path("captures")).load()
    """

    def __init__(self, folder: Path, info: CaptureInfo) -> None:
        self.folder = Path(folder)
        self.info = info
        self._sent: list[_Sent] = []

    @classmethod
    def create(cls, folder: Path, info: CaptureInfo) -> CaptureStore:
        """Start an empty store; raises `UsageError` if `folder` already holds captures."""
        folder = Path(folder)
        if (folder / "index.jsonl").exists():
            raise UsageError(f"{folder}: holds captures already; name another folder, or move these away")
        tensorfile.write_atomically(
            folder / "info.json", json.dumps({"format": FORMAT, **asdict(info)}, indent=2).encode()
        )
        tensorfile.write_atomically(folder / "index.jsonl", b"")
        return cls(folder, info)

    @classmethod
    def open(cls, folder: Path) -> CaptureStore:
        """Open an existing store; raises `UsageError` if there is none, or its `info.json` is damaged or too new."""
        folder = Path(folder)
        if not (folder / "index.jsonl").is_file():
            raise UsageError(f"{folder}: no captures here; name the folder of a run that kept some")
        try:
            info = json.loads((folder / "info.json").read_text())
            written = info.pop("format", 1)
            shape = info["image_shape"]
            if not isinstance(written, int) or written > FORMAT:
                raise UsageError(
                    f"{folder / 'info.json'}: format {written}, and this fedleak reads up to {FORMAT}; use a newer one"
                )
            info = CaptureInfo(
                **{**info, "threat": ThreatModel(**info["threat"]), "image_shape": tuple(shape) if shape else None}
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"{folder / 'info.json'}: damaged ({error}); restore it, or repeat the run") from error
        return cls(folder, info)

    def write(self, observation: Observation) -> None:
        """Add one observation; the index line is written last, so that a killed run leaves no half observation."""
        o, threat = observation, self.info.threat
        sent, training = self._start(o), o.training.seen_by(threat)
        tensors = {f"update/{k}": v for k, v in o.update.items()} if o.error is None else {}
        if threat.buffers:
            tensors |= {f"buffers/{k}": v for k, v in o.buffers.items()}
        if threat.labels and o.labels is not None:
            tensors["labels"] = o.labels
        name = f"round-{o.round:05d}-client-{o.client:05d}.safetensors"
        row = {
            "round": o.round,
            "client": o.client,
            "clients": list(o.clients),
            "payload": training.payload,
            "batch_size": training.batch_size,
            "lr": training.lr,
            "local_steps": training.local_steps,
            "epochs": training.epochs,
            "optimizer": None if training.optimizer is None else _node(training.optimizer),
            "per_sample": training.per_sample,
            "proximal": training.proximal,
            "error": o.error,
            "start_file": sent.name,
            "start_sha256": sent.sha256,
            "update_file": name,
            "update_sha256": tensorfile.save(self.folder / name, tensors),
        }
        with (self.folder / "index.jsonl").open("a") as index:
            index.write(json.dumps(row) + "\n")

    def _start(self, o: Observation) -> _Sent:
        """Where the model that `o` started from is kept; the first time a round sends it, it is written."""
        self._sent = [sent for sent in self._sent if sent.round == o.round]
        for sent in self._sent:
            if same_tensors(sent.parameters, o.parameters) and same_tensors(sent.buffers, o.start_buffers):
                return sent
        name = f"round-{o.round:05d}" + (f"-sent-to-{o.client:05d}" if self._sent else "") + ".safetensors"
        start = {f"parameters/{k}": v for k, v in o.parameters.items()}
        start |= {f"buffers/{k}": v for k, v in o.start_buffers.items()}
        sha256 = tensorfile.save(self.folder / name, start)
        self._sent.append(_Sent(o.round, o.parameters, o.start_buffers, name, sha256))
        return self._sent[-1]

    def rows(self) -> list[dict[str, Any]]:
        """The index, a dict an observation, sorted by round and client."""
        rows = []
        for number, line in enumerate((self.folder / "index.jsonl").read_text().splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UsageError(f"{self.folder / 'index.jsonl'}: line {number} is damaged; remove it") from error
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
            if grant not in ("auxiliary_data", "defense") and not getattr(self.info.threat, grant):
                raise UsageError(f"threat.{grant}=true: {self.folder} was captured without it; repeat the run with it")
        if self.info.threat.view not in ("updates", threat.view):
            raise UsageError(
                f"threat.view={threat.view}: {self.folder} holds what threat.view={self.info.threat.view} "
                "shows; repeat the run with it"
            )
        starts: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        observations = []
        for row in self.rows() if rows is None else rows:
            if row["start_file"] not in starts:
                tensors, _ = tensorfile.load(self._path(row["start_file"]), sha256=row["start_sha256"])
                starts[row["start_file"]] = (_under(tensors, "parameters/"), _under(tensors, "buffers/"))
            parameters, start_buffers = starts[row["start_file"]]
            tensors, _ = tensorfile.load(self._path(row["update_file"]), sha256=row["update_sha256"])
            observations.append(
                Observation(
                    round=row["round"],
                    client=row["client"],
                    parameters=parameters,
                    update=_under(tensors, "update/"),
                    training=self._training(row).seen_by(threat),
                    start_buffers=start_buffers,
                    buffers=_under(tensors, "buffers/") if threat.buffers else {},
                    labels=tensors.get("labels") if threat.labels else None,
                    clients=tuple(row.get("clients", ())),
                    error=row["error"],
                )
            )
        return observations

    def _path(self, name: Any) -> Path:
        """A file that the index names; none but the store's own are opened."""
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
            raise UsageError(f"{self.folder / 'index.jsonl'}: {name!r} is no file of this store; restore the line")
        return self.folder / name

    def _training(self, row: Mapping[str, Any]) -> LocalTraining:
        """How a row says that its client trained; rows of format 1 are of plain SGD for one epoch."""
        optimizer: ClientOptimizer | None = None if row["lr"] is None else SGD(row["lr"])
        if row.get("optimizer") is not None:
            target = str(row["optimizer"]["_target_"])
            kind = _known_optimizer(target)
            if kind is None:
                raise UsageError(
                    f"{self.folder / 'index.jsonl'}: {target} is no ClientOptimizer that is known here, and what a "
                    "capture names is not imported; import its module before loading, or restore the line"
                )
            optimizer = kind(**{name: value for name, value in row["optimizer"].items() if name != "_target_"})
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


@dataclass(frozen=True)
class _Sent:
    """A model that a round sent, and the file it is in."""

    round: int
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    name: str
    sha256: str


def _known_optimizer(target: str) -> type[ClientOptimizer] | None:
    """An optimiser's class, if it is imported already: a capture from someone else must not have anything imported."""
    module, _, name = target.rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    return kind if isinstance(kind, type) and issubclass(kind, ClientOptimizer) else None


def _node(optimizer: ClientOptimizer) -> dict[str, Any]:
    """An optimiser as a node to instantiate: its class and its fields."""
    kind = type(optimizer)
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **asdict(optimizer)}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
