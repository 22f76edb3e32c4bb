"""What a run or an attack leaves behind: tables, pictures, a summary, and what the tracker is told of them."""

from __future__ import annotations

import hashlib
import io
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
    rounds, sealed = rounds_of(run_dir)
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
        "rounds_sha256": sealed,
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


def _sealed(run_dir: Path) -> str | None:
    """The SHA-256 of ``rounds.csv`` that a finished run's summary tells, None where it tells none."""
    try:
        told = json.loads((run_dir / "summary.json").read_text())["rounds_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return told if isinstance(told, str) else None


def rounds_of(run_dir: Path) -> tuple[pd.DataFrame, str | None]:
    """A run's ``rounds.csv`` and its SHA-256, empty and None where there is none.

    Raises:
        UsageError: it holds something else, or is not as it was when the run ended.
    """
    path, sealed = run_dir / "rounds.csv", _sealed(run_dir)
    if not path.exists() and sealed is None:
        return pd.DataFrame(), None
    data = files.read_bytes(path)
    found = hashlib.sha256(data).hexdigest()
    if sealed not in (None, found):
        raise UsageError(f"{path}: altered since the run ended; restore it, or repeat the run")
    try:
        table = pd.read_csv(io.BytesIO(data))
        if "round" not in table or not all(pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes):
            raise ValueError("not a table of rounds")
        if not pd.api.types.is_integer_dtype(table["round"]) or table["round"].duplicated().any():
            raise ValueError("rounds that are none")
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise UsageError(f"{path}: damaged ({error}); restore it, or remove it") from error
    return table, found


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table whole or not at all; missing values are empty cells."""
    files.write_atomically(path, table.to_csv(index=False).encode())


def write_json(values: Mapping[str, Any], path: Path) -> None:
    """Write plain values whole or not at all."""
    files.write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())
