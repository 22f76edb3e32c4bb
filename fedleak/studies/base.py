"""A study: one published table or figure, reproduced by ``fedleak run experiment=NAME``."""

from __future__ import annotations

import difflib
import json
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fedleak import tensorfile
from fedleak.config import Rule, parse, whole
from fedleak.console import Console
from fedleak.errors import UsageError
from fedleak.federation.scenario import resolve_device
from fedleak.instantiate import instantiate
from fedleak.pipeline import device_name, versions, write_csv


@dataclass(frozen=True)
class Job:
    """What a study is given to work with.

    Attributes:
        config: plain containers of the whole configuration; a study reads `data`, `model`, `seed`, `device`, …
        overrides: as they were typed; the federations of a study are composed on top of them.
        folder: where everything goes.
        console: for progress.
    """

    config: Mapping[str, Any]
    overrides: Sequence[str] = ()
    folder: Path = field(default_factory=Path)
    console: Console = field(default_factory=lambda: Console(quiet=True))

    @property
    def seed(self) -> int:
        """Decides every random choice."""
        return int(self.config["seed"])

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return resolve_device(self.config["device"])

    def results(self, name: str = "results.csv") -> Results:
        """An empty table of raw rows in this job's folder."""
        return Results(self.folder / name)


class Study(ABC):
    """One published table or figure. Subclass it in a file of your own and name it by ``study._target_``.

    The constructor takes the study's settings and raises `UsageError` for an impossible one; ``study.quick`` in its
    YAML file maps settings to the smaller values of ``quick=true``.
    """

    def check(self, job: Job) -> None:  # noqa: B027  a study without anything to check has nothing to override
        """Raise `UsageError` for what cannot work (missing data, a federation that is refused), before any work."""

    @abstractmethod
    def run(self, job: Job) -> pd.DataFrame:
        """Do the work; write ``results.csv`` as rows are known, ``summary.csv`` and pictures into `job.folder`.

        Returns:
            The table to show at the end.
        """


class Results:
    """Raw rows of a study, in a file as soon as they are known: a killed study keeps what it had finished.

    Args:
        path: of the CSV file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Mapping[str, Any]] = []

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep rows, each column name -> value, and write them all."""
        self.rows += rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(self.frame, self.path)

    @property
    def frame(self) -> pd.DataFrame:
        """All rows so far."""
        return pd.DataFrame(self.rows)


def study_settings(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any] | None:
    """The settings of a config's study, the short ones where `quick` says so; None for a plain run.

    Args:
        config: plain containers.
        overrides: as typed; a setting given there is kept whatever `quick` says.

    Raises:
        UsageError: no study to make short, or an unknown setting.
    """
    node = config["study"]
    if node is None:
        if config["quick"]:
            raise UsageError(
                "quick=true: shortens a study, and there is none here; choose one, such as "
                "experiment=label_inference, or leave quick=false"
            )
        return None
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UsageError(f"study={node}: must be a _target_ with its settings; choose one by experiment=NAME")
    settings = {key: value for key, value in node.items() if key != "quick"}
    small = node.get("quick") or {}
    for key in small:
        if key not in settings:
            close = difflib.get_close_matches(key, list(settings), 1)
            mend = f"did you mean study.quick.{close[0]}?" if close else "name a setting of the study"
            raise UsageError(f"study.quick.{key}: unknown key; {mend}")
    if config["quick"]:
        given = [override.key_or_group for override in parse(overrides)]
        for key, value in small.items():
            if not any(name == f"study.{key}" or name.startswith(f"study.{key}.") for name in given):
                settings[key] = value
    return settings


def build_study(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> Study | None:
    """The study of a config, or None for a plain run; raises `UsageError` for settings that it refuses."""
    settings = study_settings(config, overrides)
    if settings is None:
        return None
    study = instantiate(settings, "study")
    if not isinstance(study, Study):
        raise UsageError(f"study._target_={settings['_target_']}: gives no fedleak.studies.Study; name a subclass")
    return study


def run_study(study: Study, job: Job, command: Sequence[str] = ()) -> pd.DataFrame:
    """Run a study and write ``study.json``, which says how to repeat it. Returns the table to show."""
    began = time.perf_counter()
    job.folder.mkdir(parents=True, exist_ok=True)
    table = study.run(job)
    facts = {
        "study": type(study).__name__,
        "command": shlex.join(command),
        "seed": job.seed,
        "quick": job.config["quick"],
        "seconds": round(time.perf_counter() - began, 3),
        "device": device_name(job.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "settings": study_settings(job.config, job.overrides),
    }
    tensorfile.write_atomically(job.folder / "study.json", (json.dumps(facts, indent=2) + "\n").encode())
    return table


def list_of(least: int) -> Rule:
    """A list of whole numbers from `least`, at least one."""
    one = whole(least)
    return Rule(
        lambda v: isinstance(v, list | tuple) and len(v) > 0 and all(map(one.test, v)),
        f"a list of whole numbers from {least}",
    )


def require(key: str, value: Any, rule: Rule) -> None:
    """Raise `UsageError` naming study.key, its value and the mend unless `rule` holds."""
    if not rule.test(value):
        raise UsageError(f"study.{key}={value}: must be {rule.mend}")
