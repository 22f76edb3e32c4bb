"""What the attacker holds about one update (`Observation`) and the folder it keeps them in (`CaptureStore`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedleak import tensorfile
from fedleak.errors import UsageError
from fedleak.threat import ThreatModel

Payload = Literal["gradient", "weights"]


@dataclass(frozen=True)
class Observation:
    """One client's update as the server saw it, and what the threat model lets the attacker know about it.

    Attributes:
        round: the server round, from 1.
        client: the client's partition id (or its position in a federation that does not tell).
        parameters: name -> tensor, the trainable parameters the client started from.
        update: name -> tensor, what the client sent back, same names and shapes.
        payload: ``gradient``: `update` is the sum over local steps of the gradients of the mean loss;
            ``weights``: `update` holds the client's new parameters.
        batch_size: samples per local step, None if withheld.
        lr: the client's learning rate, None if withheld.
        local_steps: the client's local steps, None if withheld.
        start_buffers: name -> tensor, the model's buffers as the server sent them (the server always knows them).
        buffers: name -> tensor, the buffers the client returned; empty if withheld or there are none.
        labels: ``[B * local_steps]`` int64 sorted ascending, only if the threat model grants them.
        per_sample: `update` has a leading sample dimension ``[B, ...]`` (iDLG's per-sample scenario).
        error: why the update is unusable (a client error, NaN, wrong shapes), None if it is fine.
    """

    round: int
    client: int
    parameters: Mapping[str, Tensor]
    update: Mapping[str, Tensor]
    payload: Payload = "gradient"
    batch_size: int | None = None
    lr: float | None = None
    local_steps: int | None = None
    start_buffers: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    per_sample: bool = False
    error: str | None = None

    @property
    def sign(self) -> int:
        """+1 if `update` points along the gradient, -1 if new - old weights, which point against it."""
        return 1 if self.payload == "gradient" else -1

    @property
    def scale(self) -> float | None:
        """What the mean gradient was multiplied with to give the change that was sent; None if withheld."""
        if self.payload == "weights" and self.lr is None:
            return None
        steps = self.local_steps or 1
        return float(steps if self.payload == "gradient" else steps * (self.lr or 0.0))

    def gradient(self) -> dict[str, Tensor]:
        """The mean gradient over the client's local steps, in the convention of `torch.autograd`.

        Sign and scale are undone. Where the learning rate is withheld, the result is right up to a positive factor.
        """
        scale = self.scale or 1.0
        if self.payload == "gradient":
            return {name: value / scale for name, value in self.update.items()}
        return {name: (self.parameters[name] - value) / scale for name, value in self.update.items()}


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

    Parameters that a round's clients share are stored once. Every file's SHA-256 stands in the index, so that a
    truncated or altered capture is noticed. Only what the threat model grants is ever written.

    Example:
        >>> store = CaptureStore.create(Path("captures"), CaptureInfo())
        >>> store.write(observation)
        >>> observations = CaptureStore.open(Path("captures")).load()
    """

    def __init__(self, folder: Path, info: CaptureInfo) -> None:
        self.folder = Path(folder)
        self.info = info
        self._sent: tuple[int, Mapping[str, Tensor], str, str] | None = None

    @classmethod
    def create(cls, folder: Path, info: CaptureInfo) -> CaptureStore:
        """Start an empty store; raises `UsageError` if `folder` already holds captures."""
        folder = Path(folder)
        if (folder / "index.jsonl").exists():
            raise UsageError(f"{folder}: holds captures already; name another folder, or move these away")
        tensorfile.write_atomically(folder / "info.json", json.dumps(asdict(info), indent=2).encode())
        tensorfile.write_atomically(folder / "index.jsonl", b"")
        return cls(folder, info)

    @classmethod
    def open(cls, folder: Path) -> CaptureStore:
        """Open an existing store; raises `UsageError` if there is none, or its `info.json` is damaged."""
        folder = Path(folder)
        if not (folder / "index.jsonl").is_file():
            raise UsageError(f"{folder}: no captures here; name the folder of a run that kept some")
        try:
            info = json.loads((folder / "info.json").read_text())
            shape = info["image_shape"]
            info = CaptureInfo(
                **{**info, "threat": ThreatModel(**info["threat"]), "image_shape": tuple(shape) if shape else None}
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{folder / 'info.json'}: damaged ({error}); restore it, or repeat the run") from error
        return cls(folder, info)

    def write(self, observation: Observation) -> None:
        """Add one observation; the index line is written last, so that a killed run leaves no half observation."""
        o, threat = observation, self.info.threat
        if self._sent is None or self._sent[0] != o.round or self._sent[1] is not o.parameters:
            first = self._sent is None or self._sent[0] != o.round
            name = f"round-{o.round:05d}" + ("" if first else f"-sent-to-{o.client:05d}") + ".safetensors"
            start = {f"parameters/{k}": v for k, v in o.parameters.items()}
            start |= {f"buffers/{k}": v for k, v in o.start_buffers.items()}
            self._sent = (o.round, o.parameters, name, tensorfile.save(self.folder / name, start))
        tensors = {f"update/{k}": v for k, v in o.update.items()} if o.error is None else {}
        if threat.buffers:
            tensors |= {f"buffers/{k}": v for k, v in o.buffers.items()}
        if threat.labels and o.labels is not None:
            tensors["labels"] = o.labels
        name = f"round-{o.round:05d}-client-{o.client:05d}.safetensors"
        row = {
            "round": o.round,
            "client": o.client,
            "payload": o.payload,
            "batch_size": o.batch_size if threat.batch_size else None,
            "lr": o.lr if threat.hyperparameters else None,
            "local_steps": o.local_steps if threat.hyperparameters else None,
            "per_sample": o.per_sample,
            "error": o.error,
            "start_file": self._sent[2],
            "start_sha256": self._sent[3],
            "update_file": name,
            "update_sha256": tensorfile.save(self.folder / name, tensors),
        }
        with (self.folder / "index.jsonl").open("a") as index:
            index.write(json.dumps(row) + "\n")

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
            if grant != "auxiliary_data" and not getattr(self.info.threat, grant):
                raise UsageError(f"threat.{grant}=true: {self.folder} was captured without it; repeat the run with it")
        starts: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        observations = []
        for row in self.rows() if rows is None else rows:
            if row["start_file"] not in starts:
                tensors, _ = tensorfile.load(self.folder / row["start_file"], sha256=row["start_sha256"])
                starts[row["start_file"]] = (_under(tensors, "parameters/"), _under(tensors, "buffers/"))
            parameters, start_buffers = starts[row["start_file"]]
            tensors, _ = tensorfile.load(self.folder / row["update_file"], sha256=row["update_sha256"])
            observations.append(
                Observation(
                    round=row["round"],
                    client=row["client"],
                    parameters=parameters,
                    update=_under(tensors, "update/"),
                    payload=row["payload"],
                    batch_size=row["batch_size"] if threat.batch_size else None,
                    lr=row["lr"] if threat.hyperparameters else None,
                    local_steps=row["local_steps"] if threat.hyperparameters else None,
                    start_buffers=start_buffers,
                    buffers=_under(tensors, "buffers/") if threat.buffers else {},
                    labels=tensors.get("labels") if threat.labels else None,
                    per_sample=row["per_sample"],
                    error=row["error"],
                )
            )
        return observations


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
