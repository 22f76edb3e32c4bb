"""A user's own Flower app, run in this process with nothing about it changed."""

from __future__ import annotations

import importlib
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flwr
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedleak.audit.tap import Tap
from fedleak.audit.watch import Watch
from fedleak.errors import FedleakError, UsageError
from fedleak.federation.engine import LocalGrid, quiet_flower

ROUNDS = ("num-server-rounds", "num-rounds", "num_rounds", "num_server_rounds", "rounds")
"""Keys by which apps name their number of rounds."""
NODES = 4
"""Nodes where neither the app nor its user says how many: SecAgg+ wants three, most apps two."""


@dataclass(frozen=True)
class App:
    """What an app's `pyproject.toml` says.

    Attributes:
        folder: where it is.
        name: of the project.
        server, client: ``package.module:attribute``.
        config: the run config.
        nodes: how many nodes its federations have, None if it does not say.
    """

    folder: Path
    name: str
    server: str
    client: str
    config: Mapping[str, Any]
    nodes: int | None


def read_app(folder: Path) -> App:
    """Read an app's `pyproject.toml`.

    Raises:
        UsageError: it is missing, damaged, or names no apps.
    """
    path = folder / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); name a Flower app's folder") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: no TOML ({error}); mend it") from error
    tool = project.get("tool", {}).get("flwr", {})
    parts = tool.get("app", {}).get("components", {})
    for key in ("serverapp", "clientapp"):
        if ":" not in str(parts.get(key, "")):
            raise UsageError(
                f'{path}: [tool.flwr.app.components] lacks {key} = "package.module:app"; name a Flower app\'s folder'
            )
    federations = tool.get("federations", {})
    sizes = [f["options"].get("num-supernodes") for f in federations.values() if isinstance(f, dict) and "options" in f]
    return App(
        folder=folder,
        name=project.get("project", {}).get("name", folder.name),
        server=parts["serverapp"],
        client=parts["clientapp"],
        config=dict(_flat(tool.get("app", {}).get("config", {}))),
        nodes=next((size for size in sizes if isinstance(size, int)), None),
    )


def run_app(
    app: App,
    captures: Path,
    *,
    nodes: int | None = None,
    rounds: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> tuple[Path, Watch]:
    """Run an app to its end in this process, on a tapped grid.

    Args:
        app: the app.
        captures: where the capture's folder is made.
        nodes: how many; else what the app says, else `NODES`.
        rounds: how many; else what the app says.
        config: more of its run config, which goes first.

    Returns:
        The capture's folder, and what its clients were seen doing.

    Raises:
        UsageError: a key that the app does not have, or more nodes wanted than there are.
        FedleakError: the app failed.
    """
    run_config = {**app.config}
    if rounds is not None:
        key = next((key for key in ROUNDS if key in run_config), None)
        if key is None:
            raise UsageError(
                f"--rounds={rounds}: the app's run config has none of {', '.join(ROUNDS)}; set its own key with "
                "--run-config 'KEY=VALUE'"
            )
        run_config[key] = rounds
    for key, value in (config or {}).items():
        if key not in run_config:
            raise UsageError(f"--run-config {key}={value}: the app has no such key; known: {', '.join(run_config)}")
        run_config[key] = value
    watch = Watch()
    with _imported(app.folder):
        server, client = _load(app.server, ServerApp), _load(app.client, ClientApp)
        quiet_flower()
        grid = _Grid(client, nodes or app.nodes or NODES, run_config=run_config, around=watch.around)
        tapped = Tap(grid, captures, quiet=True)
        if tapped.folder is None:
            raise FedleakError(f"{captures}: cannot be written; name another folder with --output")
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=run_config)
        try:
            server(tapped, context)
        except FedleakError:
            raise
        except Exception as error:
            raise FedleakError(
                f"{app.folder}: the app failed with {type(error).__name__}: {error}; make it run before auditing it"
            ) from error
    return tapped.folder, watch


class _Grid(LocalGrid):
    """Says so where an app waits for nodes that will never come."""

    _waiting = 0

    def get_node_ids(self) -> list[int]:
        found = list(super().get_node_ids())
        self._waiting += 1
        if self._waiting > 8:
            raise UsageError(f"--nodes={len(found)}: the app waits for more nodes than that; give it more")
        return found

    def push_messages(self, messages: Any) -> Any:
        self._waiting = 0
        return super().push_messages(messages)


@contextmanager
def _imported(folder: Path) -> Iterator[None]:
    """An app's modules, importable for as long as it runs, and forgotten after it: another may have the same names."""
    before, place = set(sys.modules), str(folder.absolute())
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and file.startswith(place + os.sep):
                del sys.modules[name]


def _load(reference: str, kind: type[Any]) -> Any:
    """An object by ``package.module:attribute``."""
    module, _, attribute = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{reference}: cannot be imported ({error}); install what the app needs, here beside Flower "
            f"{flwr.__version__}, or mend its name"
        ) from error
    if not isinstance(found, kind):
        raise UsageError(f"{reference}: is no {kind.__name__}; mend the app's pyproject.toml")
    return found


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A run config as apps see it: tables within it by dotted keys."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
