"""``fedleak run resume=DIR``: which runs, of what configuration, were begun in a folder, and must be gone on with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedleak.config import compose_config, expand_sweep, flat, plain, search_override
from fedleak.errors import UsageError
from fedleak.files import write_atomically
from fedleak.setup import Setup, read, read_condense, read_frontier, read_labels
from fedleak.trust import refuse_strangers

COMMANDS = {"config": ("run", read), "labels": ("labels", read_labels), "condense": ("condense", read_condense)} | {
    "frontier": ("frontier", read_frontier)
}
"""Root file of the configuration -> the command, and how its setup is made."""


@dataclass(frozen=True)
class Begun:
    """A run that was begun.

    Attributes:
        command: behind ``fedleak``.
        setup, overrides: as of the run itself.
        folder: its own.
    """

    command: str
    setup: Setup
    overrides: list[str]
    folder: Path


def begun(folder: Path, given: Sequence[str], *, trusted: bool) -> Iterator[Begun]:
    """The run that was begun in `folder`, or the jobs of a sweep, in order.

    Args:
        folder: a run directory, or a sweep's.
        given: overrides that the user typed again; they must be the run's own.
        trusted: whether its files may name code that is not fedleak's.

    Raises:
        UsageError: they are not the run's own, or its files are damaged or name code.
    """
    if (folder / "multirun.yaml").is_file():
        said = _load(folder / "multirun.yaml")
        root, typed, search = _typed(said, folder / "multirun.yaml")
        if OmegaConf.to_container(said, resolve=False).get("hydra", {}).get("sweep", {}).get("subdir") != SUBDIR:  # type: ignore[union-attr]
            raise UsageError(f"resume={folder}: a sweep into folders with names of its own; resume them one by one")
        for number, job in enumerate(expand_sweep(typed)):
            yield _checked(root, job, search, folder / str(number), given, trusted)
    else:
        yield _checked(*_single(folder), folder, given, trusted)


SUBDIR = "${hydra.job.num}"


def has_begun(folder: Path) -> bool:
    """Whether a run or a sweep got as far as saying what it is."""
    return any((folder / name).is_file() for name in ("multirun.yaml", ".hydra/overrides.yaml", ".hydra/hydra.yaml"))


def _load(path: Path) -> DictConfig:
    try:
        found = OmegaConf.load(path)
    except Exception as error:  # any damage at all
        raise UsageError(f"{path}: damaged; restore it, or repeat the run") from error
    if not isinstance(found, DictConfig):
        raise UsageError(f"{path}: damaged, no mapping; restore it, or repeat the run")
    return found


def _typed(hydra: DictConfig, path: Path) -> tuple[str, list[str], list[str]]:
    """(root, overrides, folders that are searched) as Hydra noted them."""
    try:
        said: Any = OmegaConf.to_container(hydra, resolve=False)
        said = said["hydra"]
        typed, search = said["overrides"]["task"], said.get("searchpath") or []
        root = said["job"]["config_name"]
        if root not in COMMANDS or not all(isinstance(word, str) for word in [*typed, *search]):
            raise ValueError(root)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: damaged ({error}); restore it, or repeat the run") from error
    return root, typed, search


def _single(folder: Path) -> tuple[str, list[str], list[str]]:
    """As `_typed`, of one run; the federations of a study have no `hydra.yaml`."""
    hydra, overrides = folder / ".hydra" / "hydra.yaml", folder / ".hydra" / "overrides.yaml"
    if hydra.is_file():
        return _typed(_load(hydra), hydra)
    try:
        typed = OmegaConf.to_container(OmegaConf.load(overrides), resolve=False)
    except Exception as error:
        raise UsageError(f"{overrides}: missing or damaged; restore it, or repeat the run") from error
    if not isinstance(typed, list) or not all(isinstance(word, str) for word in typed):
        raise UsageError(f"{overrides}: not a list of overrides; restore it, or repeat the run")
    return "config", [str(word) for word in typed], []


def _checked(
    root: str, typed: list[str], search: list[str], folder: Path, given: Sequence[str], trusted: bool
) -> Begun:
    """A run, once what it names is known to be the user's or fedleak's own, and what is given again to be the same."""
    overrides = [*typed, *([search_override(search)] if search else [])]
    if not trusted:
        refuse_strangers(overrides, given, overrides, root)
    config = compose_config(overrides, root)
    again = compose_config([*overrides, *given], root) if given else config
    _same(config, again, folder, "{key}={new}: the run in {folder} is of {key}={old}; leave it out, or begin another")
    kept = folder / ".hydra" / "config.yaml"
    values = plain(config)
    if kept.is_file():
        was = _load(kept)
        if was.get("study", 0) is None:  # a federation of a study
            config = OmegaConf.create({**config, "study": None, "quick": False})
            values |= {"study": None, "quick": False}
        _same(was, config, folder, "resume={folder}: {key} was {old} when it began and is {new} now; repeat the run")
    else:  # a job of a sweep that was not reached
        write_atomically(kept, OmegaConf.to_yaml(config).encode())
        write_atomically(kept.with_name("overrides.yaml"), OmegaConf.to_yaml(OmegaConf.create(overrides)).encode())
    command, make = COMMANDS[root]
    return Begun(command, make(values, overrides), overrides, folder)


def _same(was: DictConfig, now: DictConfig, folder: Path, words: str) -> None:
    """Raise `UsageError` with `words` where two configurations differ."""
    a, b = (flat(OmegaConf.to_container(one, resolve=False)) for one in (was, now))
    for key in sorted({*a, *b}):
        if a.get(key) != b.get(key) and key.split(".")[0] not in ("output_dir", "hydra"):
            raise UsageError(words.format(key=key, old=a.get(key), new=b.get(key), folder=folder))
