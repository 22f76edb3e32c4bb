"""What a run or an attack leaves behind: tables, pictures, a summary, and what the tracker is told of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fedleak import files
from fedleak.errors import UsageError
from fedleak.evaluation.judge import Judgement
from fedleak.evaluation.tables import leakage_by_round, round_table, side_by_side, summarise
from fedleak.tracking import NoTracker, Tracker, finite


@dataclass(frozen=True)
class Outcome:
    """What a run or an attack left behind.

    Attributes:
        folder: where tables and pictures are.
        table: per round, test accuracy, label accuracy and images recovered.
        summary: what `summary.json` holds.
        report: the page, where a tracker has asked for it already.
    """

    folder: Path
    table: pd.DataFrame
    summary: dict[str, Any]
    report: Path | None = None


def write_outcome(
    judgement: Judgement,
    run_dir: Path,
    folder: Path,
    said: Mapping[str, Any],
    tracker: Tracker,
    *,
    naive: Judgement | None = None,
) -> Outcome:
    """Write tables, pictures and summary into `folder`, and tell the tracker.

    Args:
        judgement: of the attack.
        run_dir: the run that was attacked, which holds ``rounds.csv``.
        folder: where everything goes, `run_dir` itself or a folder of its own.
        said: what the summary holds besides the results.
        tracker: started already.
        naive: beside an adaptive attack, of the same attack without; both then stand in ``attackers.csv``, in the
            summary and in the report.
    """
    attacks, leakage, kept = judgement.attacks, judgement.leakage, judgement.reconstructions
    rounds = read_rounds(run_dir / "rounds.csv")
    write_csv(attacks, folder / "attacks.csv")
    write_csv(leakage, folder / "leakage.csv")
    if kept is not None:
        from fedleak.report.pictures import evolution_png, reconstructions_png

        reconstructions_png(folder / "reconstructions.png", judgement.matches)
        if any(pair.frames for pair in judgement.matches):
            evolution_png(folder / "evolution.png", judgement.matches)
    attackers: list[dict[str, Any]] = []
    if naive is not None:
        attackers = [side_by_side("naive", naive.attacks, naive.leakage), side_by_side("adaptive", attacks, leakage)]
        write_csv(pd.DataFrame(attackers), folder / "attackers.csv")
    summary = {
        **summarise(attacks, leakage, rounds),
        **({"attackers": attackers} if attackers else {}),
        **said,
        "run_dir": os.path.relpath(run_dir, folder),
        "reconstructions": None if kept is None else os.path.relpath(kept, folder),
    }
    write_json(summary, folder / "summary.json")
    report = None if isinstance(tracker, NoTracker) else _tell(tracker, folder, attacks, leakage, summary)
    return Outcome(folder, round_table(rounds, attacks, leakage), summary, report)


def _tell(
    tracker: Tracker, folder: Path, attacks: pd.DataFrame, leakage: pd.DataFrame, summary: Mapping[str, Any]
) -> Path:
    """Hand a finished run's leakage, pictures, tables and report to its tracker; returns the report."""
    from fedleak.report.html import write_report

    report = write_report([folder], folder / "report.html")
    for number, leaked in leakage_by_round(attacks, leakage).items():
        tracker.log(number, finite(leaked, "leakage/"))
    for pattern in ("*.png", "*.csv", "summary.json", report.name):
        for path in sorted(folder.glob(pattern)):
            tracker.keep(path.absolute())
    tracker.finish(finite(summary))
    return report


def read_rounds(path: Path) -> pd.DataFrame:
    """A run's ``rounds.csv``, empty where there is none; raises `UsageError` where it holds something else."""
    if not path.exists():
        return pd.DataFrame()
    try:
        table = pd.read_csv(path)
        if "round" not in table or not all(pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes):
            raise ValueError("not a table of rounds")
        if not pd.api.types.is_integer_dtype(table["round"]) or table["round"].duplicated().any():
            raise ValueError("rounds that are none")
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise UsageError(f"{path}: damaged ({error}); restore it, or remove it") from error
    return table


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table whole or not at all; missing values are empty cells."""
    files.write_atomically(path, table.to_csv(index=False).encode())


def write_json(values: Mapping[str, Any], path: Path) -> None:
    """Write plain values whole or not at all."""
    files.write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())
