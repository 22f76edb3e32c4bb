"""``fedleak collect DIR``: one table over all the runs in a folder, of a sweep say."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fedleak.errors import UsageError
from fedleak.outcome import write_csv

FACTS = ("attack", "defense", "data", "partition", "model", "seed", "device")
FIGURES = (
    *("rounds", "final_test_accuracy", "observations", "failed", "label_accuracy", "whole_batch_rate"),
    *("images", "recovered", "recovered_rate", "images_not_tried", "median_mse", "median_psnr", "median_limit_mse"),
    *("median_expected_mse", "limit_bits", "evaluations", "attack_seconds", "seconds"),
)
"""Of ``summary.json``."""
SHOWN = ("final_test_accuracy", "label_accuracy", "images", "recovered", "median_psnr")
"""In the terminal, beside what differs."""
ELSEWHERE = ("output_dir", "run_dir", "resume", "tracking")
"""Overrides that decide no figure."""


@dataclass(frozen=True)
class Collection:
    """What was found.

    Attributes:
        table: a row a run, or attack on one: `run` (its folder), `FACTS`, a column an override besides, `FIGURES`.
        unfinished: folders of runs that have no ``summary.json`` yet.
        unreadable: those whose ``summary.json`` is damaged, and why.
    """

    table: pd.DataFrame
    unfinished: list[str]
    unreadable: list[str]

    @property
    def shown(self) -> pd.DataFrame:
        """The run, what differs between runs, and the figures that matter most."""
        free = [column for column in self.table if column not in ("run", *FIGURES)]
        differing = [column for column in free if self.table[column].astype(str).nunique() > 1]
        return self.table[["run", *differing, *SHOWN]].round({"median_psnr": 1})


def collect(folder: Path) -> Collection:
    """Find every run below a folder, the folder itself included; nothing in it is changed.

    Raises:
        UsageError: there is no such folder, or no finished run in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; name one with runs in it")
    rows, unreadable = [], []
    for path in sorted(folder.rglob("summary.json"), key=_naturally):
        name = path.parent.relative_to(folder).as_posix()
        try:
            summary = json.loads(path.read_text())
            if not isinstance(summary, Mapping) or "command" not in summary:
                continue  # some other program's, or a study's
            rows.append({"run": name, **_row(summary)})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            unreadable.append(f"{name}: {error}")
    begun = {path.parent.parent for path in folder.rglob(".hydra/overrides.yaml")}
    unfinished = [
        path.relative_to(folder).as_posix()
        for path in sorted(begun, key=_naturally)
        if not (path / "summary.json").exists() and not (path / "study.json").exists()
    ]
    if not rows:
        raise UsageError(f"{folder}: no finished run in it; name a folder that fedleak run has written to")
    found = dict.fromkeys(key for row in rows for key in row)
    typed = [key for key in found if key not in ("run", *FACTS, *FIGURES)]
    return Collection(pd.DataFrame(rows, columns=["run", *FACTS, *typed, *FIGURES]), unfinished, unreadable)


def write(collection: Collection, path: Path) -> None:
    """The table as CSV, whole or not at all."""
    write_csv(collection.table, path)


def _row(summary: Mapping[str, Any]) -> dict[str, Any]:
    words = [word.lstrip("+~").partition("=") for word in shlex.split(str(summary["command"])) if "=" in word]
    typed = {key: value for key, _, value in words if key.split(".")[0] not in (*ELSEWHERE, "hydra")}
    known = {key: summary.get(key) for key in (*FACTS, *FIGURES)}
    return {**{key: value for key, value in typed.items() if key not in known}, **known}


def _naturally(path: Path) -> list[tuple[int, int, str]]:
    """Job 10 behind job 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.parts]
