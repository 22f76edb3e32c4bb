"""A study: one published table or figure, reproduced by ``fedleak run experiment=NAME``."""

from __future__ import annotations

import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fedleak.attacks import LabelInference
from fedleak.config import Rule
from fedleak.console import Console
from fedleak.devices import device_name
from fedleak.errors import UsageError
from fedleak.facts import versions
from fedleak.outcome import write_csv, write_json
from fedleak.setup import Setup, named


@dataclass(frozen=True)
class Job:
    """What a study is given to work with.

    Attributes:
        setup: the whole configuration; a study reads `data`, `model`, `federation`, …
        overrides: as they were typed; the federations of a study are composed on top of them.
        folder: where everything goes.
        console: for progress.
        resume: whether to go on from what an interrupted run of the same study left in `folder`.
    """

    setup: Setup
    overrides: Sequence[str] = ()
    folder: Path = field(default_factory=Path)
    console: Console = field(default_factory=lambda: Console(quiet=True))
    resume: bool = False

    @property
    def seed(self) -> int:
        """Decides every random choice."""
        return self.setup.seed

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return self.setup.torch_device

    def results(self, name: str = "results.csv") -> Results:
        """An empty table of raw rows in this job's folder, which knows those of a study that was interrupted there."""
        path = self.folder / name
        return Results(path, read_rows(path) if self.resume and path.exists() else ())

    def methods(self, names: Sequence[str], key: str = "study.methods") -> dict[str, LabelInference]:
        """Choices of ``attack/labels``, the user's own too; raises `UsageError` that says `key` where one is none."""
        parts = named("attack/labels", names, self.overrides, key)
        return {name: part.build(LabelInference) for name, part in parts.items()}


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
        earlier: rows that an interrupted study had finished, which `take` takes over.
    """

    def __init__(self, path: Path, earlier: Sequence[Mapping[str, Any]] = ()) -> None:
        self.path = path
        self.rows: list[Mapping[str, Any]] = []
        self.earlier = earlier

    def take(self, **where: Any) -> int:
        """Take over the rows of an interrupted study that hold these values; how many there were."""
        found = [row for row in self.earlier if all(row.get(key) == value for key, value in where.items())]
        self.rows += found
        return len(found)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep rows, each column name -> value, and write them all."""
        self.rows += rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(self.frame, self.path)

    @property
    def frame(self) -> pd.DataFrame:
        """All rows so far."""
        return pd.DataFrame(self.rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a study's CSV file, None for empty cells; raises `UsageError` where it is damaged."""
    try:
        frame = pd.read_csv(path)
    except pd.errors.EmptyDataError:
        return []
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: damaged ({error}); restore it, or remove it and begin anew") from error
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [{str(column): value for column, value in row.items()} for row in rows]


def build_study(setup: Setup) -> Study:
    """The study of a setup that names one; raises `UsageError` for settings that it refuses."""
    assert setup.study is not None
    study: Study = setup.study.build(Study)
    return study


def run_study(study: Study, job: Job, command: Sequence[str] = ()) -> pd.DataFrame:
    """Run a study and write ``study.json``, which says how to repeat it. Returns the table to show.

    It stands there from the beginning, without `seconds`, so that an interrupted study says what its rows are of.
    """
    began = time.perf_counter()
    job.folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "study": type(study).__name__,
        "command": shlex.join(command),
        "seed": job.seed,
        "quick": job.setup.quick,
        "seconds": None,
        "device": device_name(job.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "settings": None if job.setup.study is None else job.setup.study.node,
        "model": job.setup.model.node,
    }
    write_json(facts, job.folder / "study.json")
    table = study.run(job)
    write_json(facts | {"seconds": round(time.perf_counter() - began, 3)}, job.folder / "study.json")
    return table


def require(name: str, value: Any, rule: Rule, key: str = "study") -> None:
    """Raise `UsageError` naming the setting, its value and the mend unless `rule` holds."""
    if not rule.test(value):
        raise UsageError(f"{key}.{name}={value}: must be {rule.mend}")
