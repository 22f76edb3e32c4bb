"""What a run directory from someone else may name: parts of fedleak; anything else only where the user trusts it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedleak.config import SEARCH, choice_files, compose_config, parse, plain, search_folders
from fedleak.errors import UsageError

ROOMS = tuple(
    f"fedleak.{room}."
    for room in ("attacks", "data", "defenses", "models", "tracking", "training", "federation", "studies")
)
"""Modules whose classes are parts: making one changes nothing outside this process."""


def refuse_strangers(stored: Sequence[str], now: Sequence[str], merged: Sequence[str], root: str = "config") -> None:
    """Raise `UsageError` where a stored run would have something imported that is not fedleak's.

    Args:
        stored: the overrides that its files hold.
        now: those that the user typed today, which are trusted, and so are the folders that they search.
        merged: both together, which are composed here and nothing in them is imported.
        root: the root file of the configuration.

    Raises:
        UsageError: names what would be imported, and how to allow it.
    """
    for override in parse(stored):
        key = override.key_or_group
        if key.split(".")[0].split("/")[0] == "hydra" and key != SEARCH:
            raise _stranger(override.input_line or key, "sets Hydra's own configuration")
        again = override.input_line in now
        if key.startswith("engine.init_args") and not again:
            raise _stranger(override.input_line or key, "names a cluster")
        if key.startswith("tracking.") and not again and _leaves(str(override.value())):
            raise _stranger(override.input_line or key, "has files written elsewhere")
    for folder in search_folders(stored):
        if not folder.startswith("file://") and folder not in search_folders(now):
            raise _stranger(f"{SEARCH}={folder}", "has a package imported")
    config = compose_config(merged, root)
    from omegaconf import OmegaConf

    if "oc.env" in str(OmegaConf.to_container(config, resolve=False)) and not any("oc.env" in one for one in now):
        raise _stranger("${oc.env:…}", "reads this machine's environment")
    trusted = set(_targets_given(now))
    for key, target in _targets(plain(config)):
        if target not in trusted and not is_own(target):
            raise _stranger(f"{key}={target}", "names code that is not fedleak's")


def is_own(target: str) -> bool:
    """Whether an import path names a part of fedleak: what its own YAML files name, or a class of its own modules."""
    if target in set(_targets_in(path for files in choice_files().values() for path in files.values())):
        return True
    module, _, name = target.rpartition(".")
    if not f"{module}.".startswith(ROOMS):
        return False
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return False
    return isinstance(found, type) and found.__module__.startswith("fedleak.")


def _leaves(path: str) -> bool:
    """Whether a path leads out of where the user stands."""
    path = path.removeprefix("sqlite:///")
    return path.startswith(("/", "~")) or ".." in path.split("/")


def _stranger(what: str, does: str) -> UsageError:
    return UsageError(
        f"{what}: stands in the files of the stored run and {does}; read them, then give the same override again, or "
        "--trust if you trust whoever made that run"
    )


def _targets_given(now: Sequence[str]) -> Iterator[str]:
    """What the user names today, on the command line or in the folders of ``--config-dir``."""
    for override in parse(now):
        value = override.value()
        if override.key_or_group.endswith("_target_"):
            yield str(value)
        yield from (target for _, target in _targets(value))
    for folder in search_folders(now):
        yield from _targets_in(Path(folder.removeprefix("file://")).rglob("*.yaml"))


def _targets_in(paths: Any) -> Iterator[str]:
    """What YAML files name; one that cannot be read names nothing."""
    for path in paths:
        found = re.findall(r"_target_\s*['\"]?\s*:\s*([^\s,}\]]+)", path.read_text(encoding="utf-8", errors="replace"))
        yield from (str(yaml.safe_load(one)) for one in found)


def _targets(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, import path) of every ``_target_`` in plain containers."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            where = f"{key}.{name}".lstrip(".")
            if name == "_target_":
                yield where, str(value)
            else:
                yield from _targets(value, where)
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from _targets(value, f"{key}[{number}]")
