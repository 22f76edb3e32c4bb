"""A wiretap on a Flower federation: everything that its server sends and hears, as it is, on disk.

Needs only flwr, numpy and safetensors, so that it fits into any app's environment.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, overload

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from safetensors.numpy import save

from fedleak import files

FORMAT = "tap-1"
"""Of the folder that a tap writes."""
_KINDS = "biuf"
"""Of numbers that safetensors can keep: booleans, integers, unsigned ones, floats of up to eight bytes."""


@overload
def tap(target: ServerApp, captures: str | Path = ..., *, quiet: bool = ...) -> ServerApp: ...
@overload
def tap(target: Grid, captures: str | Path = ..., *, quiet: bool = ...) -> Grid: ...
def tap(target: Grid | ServerApp, captures: str | Path = "captures", *, quiet: bool = False) -> Grid | ServerApp:
    """Record what a federation's server sends and hears; the federation runs as before.

    The first line of a ServerApp's ``main``::

        grid = fedleak.tap(grid, "captures")

    or, for an app without a main (``ServerApp(server_fn=…)``), the line below it::

        app = fedleak.tap(app, "captures")

    Each run gets a folder of its own in `captures`, whose absolute path is printed. Whatever goes wrong in recording is
    noted there, or printed, and never raised. Audit the folder with ``fedleak audit``.

    Args:
        target: the grid that Flower handed to the ServerApp, or the ServerApp.
        captures: folder for the runs; a relative one counts from where the server process runs.
        quiet: print nothing.

    Returns:
        What to use in place of `target`.
    """
    if isinstance(target, ServerApp):
        return TappedApp(target, captures, quiet=quiet)
    return Tap(target, captures, quiet=quiet)


class TappedApp(ServerApp):
    """A ServerApp whose grid is tapped."""

    def __init__(self, app: ServerApp, captures: str | Path, *, quiet: bool = False) -> None:
        super().__init__()
        self._inner, self._captures, self._quiet = app, captures, quiet

    def __call__(self, grid: Grid, context: Context) -> None:
        """Run the wrapped app on a tapped grid."""
        self._inner(Tap(grid, self._captures, quiet=self._quiet), context)


class Passing(Grid):
    """A grid that passes everything on to another; what it is told of messages and replies changes nothing."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def sends(self, messages: list[Message]) -> Any:
        """Told of messages before they go: their content may be changed, or used up, by sending it."""

    def sent(self, messages: list[Message], told: Any) -> None:
        """Told of them once they have gone and have their ids; `told` is what `sends` returned."""

    def hears(self, replies: list[Message]) -> None:
        """Told of replies before the server gets them."""

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The wrapped grid's."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Pass on."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Pass on."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Pass on."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        messages = list(messages)
        told = self.sends(messages)
        ids = list(self._grid.push_messages(messages))
        self.sent(messages, told)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        replies = list(self._grid.pull_messages(message_ids))
        self.hears(replies)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Pass on."""
        messages = list(messages)
        told = self.sends(messages)
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        self.sent(messages, told)
        self.hears(replies)
        return replies

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also while this object is being made or unpickled
            raise AttributeError(name)
        return getattr(self._grid, name)


class Tap(Passing):
    """A grid that passes everything on to another, and records the messages and their replies."""

    def __init__(self, grid: Grid, captures: str | Path, *, quiet: bool = False) -> None:
        super().__init__(grid)
        self._quiet = quiet
        self._lock = threading.Lock()
        self._record: Recorder | None = None
        try:
            self._record = Recorder(Path(captures), self._about())
        except Exception as problem:
            self._say(f"fedleak: nothing is captured: {_told(problem)}")
        else:
            self._say(f"fedleak: capturing in {self._record.folder}")

    @property
    def folder(self) -> Path | None:
        """Where this run is recorded, absolute; None if nothing can be."""
        return None if self._record is None else self._record.folder

    def sends(self, messages: list[Message]) -> list[dict[str, Any] | None]:
        """Keep the contents."""
        return [self._note(message) for message in messages]

    def sent(self, messages: list[Message], told: list[dict[str, Any] | None]) -> None:
        """A line a message: one that is never answered is on record too."""
        for message, note in zip(messages, told, strict=True):
            if note is None or self._record is None:
                continue
            try:
                with self._lock:
                    self._record.line({"kind": "sent", "id": message.metadata.message_id, **note})
            except Exception as problem:
                self._fail(problem)

    def hears(self, replies: list[Message]) -> None:
        """A line a reply."""
        for reply in replies:
            if self._record is None:
                return
            try:
                with self._lock:
                    self._record.line(self._reply(reply, self._record))
            except Exception as problem:
                self._fail(problem)

    def _note(self, message: Message) -> dict[str, Any] | None:
        if self._record is None:
            return None
        try:
            with self._lock:
                content = message.content if message.has_content() else RecordDict()
                return {
                    "type": message.metadata.message_type,
                    "group": message.metadata.group_id,
                    "node": str(message.metadata.dst_node_id),
                    "time": time.time(),
                    "content": self._record.keep(content, "sent"),
                }
        except Exception as problem:
            self._fail(problem)
            return None

    def _reply(self, reply: Message, record: Recorder) -> dict[str, Any]:
        return {
            "kind": "reply",
            "id": reply.metadata.reply_to_message_id,  # of the message that it answers
            "type": reply.metadata.message_type,
            "node": str(reply.metadata.src_node_id),
            "time": time.time(),
            "error": {"code": reply.error.code, "reason": reply.error.reason} if reply.has_error() else None,
            "content": record.keep(reply.content, "reply") if reply.has_content() else None,
        }

    def _about(self) -> dict[str, Any]:
        about: dict[str, Any] = {"server": os.getpid(), "started": time.time()}
        with contextlib.suppress(Exception):
            about["run_id"] = str(self._grid.run.run_id)
        return about

    def _fail(self, problem: Exception) -> None:
        """Note that something could not be recorded."""
        self._say(f"fedleak: not captured: {_told(problem)}")
        with contextlib.suppress(Exception):
            assert self._record is not None
            self._record.line({"kind": "problem", "what": _told(problem), "time": time.time()})

    def _say(self, words: str) -> None:
        if not self._quiet:
            with contextlib.suppress(Exception):
                print(words, file=sys.stderr, flush=True)


class Recorder:
    """The folder of one run: `info.json`, `index.jsonl` with a line a message, and safetensors files.

    A content that is equal to one kept before, as a model that is sent to every node, is kept once.

    Args:
        captures: where the run's folder is made.
        about: what `info.json` says beside the format.
    """

    def __init__(self, captures: Path, about: Mapping[str, Any]) -> None:
        stamp = time.strftime("run-%Y%m%d-%H%M%S")
        for attempt in range(1000):
            self.folder = (captures / (f"{stamp}-{attempt}" if attempt else stamp)).absolute()
            try:
                self.folder.mkdir(parents=True)
                break
            except FileExistsError:
                continue
        self._kept: dict[str, str] = {}
        files.write_atomically(self.folder / "info.json", json.dumps({"format": FORMAT, **about}, indent=2).encode())
        (self.folder / "index.jsonl").touch()

    def line(self, row: Mapping[str, Any]) -> None:
        """Add a line to the index."""
        with (self.folder / "index.jsonl").open("a") as index:
            index.write(json.dumps(row) + "\n")

    def keep(self, content: RecordDict, kind: str) -> dict[str, Any]:
        """Keep a message's content; returns what the index says of it."""
        tensors: dict[str, np.ndarray] = {}
        arrays: dict[str, list[str]] = {}
        for name, record in content.array_records.items():
            arrays[name] = list(record)
            for key, array in record.items():
                tensors[f"arrays/{name}/{key}"] = _numpy(array)
        configs = {name: _plain(record, f"configs/{name}", tensors) for name, record in content.config_records.items()}
        metrics = {name: _plain(record, f"metrics/{name}", tensors) for name, record in content.metric_records.items()}
        told: dict[str, Any] = {"arrays": arrays, "configs": configs, "metrics": metrics, "file": None}
        if tensors:
            data = save({name: np.require(value, requirements="C") for name, value in tensors.items()})
            told["sha256"] = hashlib.sha256(data).hexdigest()
            if told["sha256"] not in self._kept:
                self._kept[told["sha256"]] = f"{kind}-{len(self._kept):06d}.safetensors"
                files.write_atomically(self.folder / self._kept[told["sha256"]], data)
            told["file"] = self._kept[told["sha256"]]
        return told


def _numpy(array: Any) -> np.ndarray:
    """An array as numpy, or the bytes of one that is of no kind that can be kept."""
    try:
        value = np.asarray(array.numpy())
        if value.dtype.kind in _KINDS and value.dtype.itemsize <= 8:
            return value
    except Exception:  # of another framework, or damaged: kept as it came
        pass
    return np.frombuffer(array.data, dtype=np.uint8)


def _plain(record: Mapping[str, Any], place: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """A record as JSON; its bytes go to `tensors` and leave their place and length behind."""
    plain: dict[str, Any] = {}
    for key, value in record.items():
        several = isinstance(value, list)
        values = value if several else [value]
        if not any(isinstance(v, bytes) for v in values):
            plain[key] = value
            continue
        for number, each in enumerate(values):
            tensors[f"{place}/{key}/{number}"] = np.frombuffer(each, dtype=np.uint8)
        plain[key] = {"bytes": [len(each) for each in values]}
    return plain


def _told(problem: Exception) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())
