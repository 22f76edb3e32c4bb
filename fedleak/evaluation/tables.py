"""The tables of a run, ``attacks.csv`` and ``leakage.csv``, and what they say in a few numbers.

A missing truth is no error: its scores stay empty (None in a row, an empty CSV cell) and every row is still there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from fedleak.attacks.results import Reconstruction, StopReason
from fedleak.evaluation.matching import Match, match
from fedleak.evaluation.metrics import label_accuracy, labels_exact
from fedleak.truth import Truth

ATTACK_COLUMNS = (
    "round",
    "client",
    "attack",
    "defense",
    "batch_size",
    "label_accuracy",
    "labels_exact",
    "objective",
    "evaluations",
    "seconds",
    "stop_reason",
    "update_residual",
    "limit_bits",
    "method",
    "why",
)
"""Columns of ``attacks.csv``, a row an observation."""


def score(
    reconstruction: Reconstruction,
    truth: Truth | None,
    *,
    attack: str,
    defense: str,
    batch_size: int | None,
    update_residual: float | None,
    limit_bits: float | None = None,
    limit_mse: Tensor | None = None,
    matches: Sequence[Match] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score one reconstruction against the truth.

    An attack that `failed` has its row in ``attacks.csv``, with its error as the stop reason and empty scores, and no
    rows in ``leakage.csv``: there was nothing to attack, so its images count neither as recovered nor as safe.

    Args:
        reconstruction: what the attacker rebuilt.
        truth: the private batch, None where it is missing.
        attack, defense: names for the table.
        batch_size: samples per local step, None if unknown.
        update_residual: relative distance between the captured update and the one recomputed from the truth.
        limit_bits: how many bits the update tells about the batch, None where no limit was computed.
        limit_mse: ``[B]``, as for `match`.
        matches: what `match` made of all this, where it is at hand already.

    Returns:
        The row of ``attacks.csv`` (`ATTACK_COLUMNS`) and the rows of ``leakage.csv`` (`Match.row`).
    """
    judged = truth is not None and len(truth.labels) > 0 and not reconstruction.failed
    row = {
        "round": reconstruction.round,
        "client": reconstruction.client,
        "attack": attack,
        "defense": defense,
        "batch_size": batch_size,
        "label_accuracy": label_accuracy(truth.labels, reconstruction.labels) if truth and judged else None,
        "labels_exact": labels_exact(truth.labels, reconstruction.labels) if truth and judged else None,
        "objective": None if math.isnan(reconstruction.objective) else reconstruction.objective,
        "evaluations": reconstruction.evaluations,
        "seconds": reconstruction.seconds,
        "stop_reason": reconstruction.stop_reason,
        "update_residual": update_residual,
        "limit_bits": limit_bits,
        "method": reconstruction.details.get("method"),
        "why": reconstruction.details.get("why"),
    }
    if matches is None:
        matches = match(reconstruction, truth, limit_mse=limit_mse)
    return row, [pair.row() for pair in matches]


def summarise(attacks: pd.DataFrame, leakage: pd.DataFrame, rounds: pd.DataFrame) -> dict[str, Any]:
    """The run in a few numbers, as plain JSON: no NaN and no inf; None where nothing was measured.

    Args:
        attacks: rows of ``attacks.csv``, built in memory or read back.
        leakage: rows of ``leakage.csv``.
        rounds: rows of ``rounds.csv``.

    Returns:
        ``rounds``, ``final_test_accuracy``; ``observations`` (attacked), ``failed`` (of these, without any result),
        ``label_accuracy`` (mean over observations), ``whole_batch_rate`` (share of observations with every label
        right); ``images`` (that were tried and scored), ``recovered``, ``recovered_rate``, ``images_not_tried`` (of
        updates whose labels alone were attacked: neither recovered nor safe), ``median_mse``, ``median_psnr`` (dB; None
        where the median image is exact, that is infinite); ``median_limit_mse`` (over the images whose limit is known),
        ``median_expected_mse`` (over those that the attacker judged itself), ``limit_bits`` (median over updates);
        ``evaluations`` and ``attack_seconds`` (totals); ``stop_reasons`` (count of each); ``methods`` (the same, where
        the attack chose one).
    """
    scored, recovered = (_flags(table, "recovered").dropna() for table in (leakage, _tried(attacks, leakage)))
    test_accuracy = _numbers(rounds, "test_accuracy").dropna()
    reasons = attacks["stop_reason"].fillna("").astype(str) if "stop_reason" in attacks else pd.Series([], dtype=str)
    attacked = set(zip(leakage.get("round", []), leakage.get("client", []), strict=True))
    all_rows = list(zip(attacks.get("round", []), attacks.get("client", []), strict=True))
    return {
        "rounds": len(rounds),
        "final_test_accuracy": _plain(test_accuracy.iloc[-1]) if len(test_accuracy) else None,
        "observations": len(attacks),
        "failed": sum(row not in attacked for row in all_rows),
        "label_accuracy": _plain(_numbers(attacks, "label_accuracy").mean()),
        "whole_batch_rate": _plain(_flags(attacks, "labels_exact").mean()),
        "images": len(recovered),
        "recovered": int(recovered.sum()),
        "recovered_rate": _plain(recovered.mean()),
        "images_not_tried": len(scored) - len(recovered),
        "median_mse": _plain(_numbers(leakage, "mse").median()),
        "median_psnr": _plain(_numbers(leakage, "psnr").median()),
        "median_limit_mse": _plain(_numbers(leakage, "limit_mse").median()),
        "median_expected_mse": _plain(_numbers(leakage, "expected_mse").median()),
        "limit_bits": _plain(_numbers(attacks, "limit_bits").median()),
        "evaluations": int(_numbers(attacks, "evaluations").sum()),
        "attack_seconds": _plain(_numbers(attacks, "seconds").sum()),
        "methods": _methods(attacks),
        "stop_reasons": {str(reason): int(count) for reason, count in reasons.value_counts().items()},
    }


def side_by_side(attacker: str, attacks: pd.DataFrame, leakage: pd.DataFrame) -> dict[str, Any]:
    """One attacker's row of ``attackers.csv``: the numbers of `summarise` that compare it with another."""
    found = summarise(attacks, leakage, pd.DataFrame())
    kept = ("observations", "label_accuracy", "whole_batch_rate", "images", "recovered", "median_mse", "median_psnr")
    return {"attacker": attacker} | {name: found[name] for name in (*kept, "evaluations", "attack_seconds")}


def _methods(attacks: pd.DataFrame) -> dict[str, int]:
    """How many updates were rebuilt by which method, and why by that one."""
    if "why" not in attacks:
        return {}
    chosen = attacks.dropna(subset=["why"])
    said = chosen["method"].astype(str) + ", since " + chosen["why"].astype(str)
    return {str(text): int(count) for text, count in said.value_counts().items()}


def round_table(rounds: pd.DataFrame, attacks: pd.DataFrame, leakage: pd.DataFrame, *, most: int = 12) -> pd.DataFrame:
    """What a run prints at its end: utility and leakage, round by round.

    Args:
        rounds, attacks, leakage: the three tables.
        most: beyond this many rounds, only those that were attacked and the last one are listed.

    Returns:
        ``round``, ``test_accuracy``, ``label_accuracy`` (mean over the round's observations) and ``recovered`` as
        ``k / n`` images; NaN and an empty string where nothing was attacked, no image tried or no truth known. Where a
        limit is known, also ``reached_mse`` and ``possible_mse``: the medians of error and limit over the round's
        images that have both, in words.
    """
    found = _by_round(attacks, leakage)
    table = pd.DataFrame({"round": _numbers(rounds, "round"), "test_accuracy": _numbers(rounds, "test_accuracy")})
    table["round"] = table["round"].astype(int)
    if len(table) > most:
        attacked = table["round"].isin(_numbers(attacks, "round"))
        table = table[attacked | (table.index == table.index[-1])].reset_index(drop=True)
    found = found.reindex(table["round"]).reset_index(drop=True)
    table["label_accuracy"] = found["label_accuracy"]
    table["recovered"] = [
        f"{k:.0f} / {n:.0f}" if n > 0 else "" for k, n in zip(found["hits"], found["images"], strict=True)
    ]
    if found["possible_mse"].notna().any():
        for column in ("reached_mse", "possible_mse"):
            table[column] = [f"{value:.1e}" if value >= 0 else "" for value in found[column]]
    return table


def leakage_by_round(attacks: pd.DataFrame, leakage: pd.DataFrame) -> dict[int, dict[str, float]]:
    """What leaked in each attacked round.

    Args:
        attacks, leakage: the tables.

    Returns:
        round -> ``label_accuracy`` (mean over the round's observations), ``recovered`` (share of its images) and
        ``median_psnr`` (dB, inf where exact); NaN where the truth is missing or no image was tried.
    """
    found = _by_round(attacks, leakage)
    found["recovered"] = found["hits"] / found["images"]
    columns = ["label_accuracy", "recovered", "median_psnr"]
    return {
        int(number): dict(zip(columns, map(float, found.loc[number, columns]), strict=True)) for number in found.index
    }


def _by_round(attacks: pd.DataFrame, leakage: pd.DataFrame) -> pd.DataFrame:
    """A row an attacked round: what its updates' labels and those of its images that were tried came to."""
    leakage = _tried(attacks, leakage)
    number = _numbers(leakage, "round")
    recovered = _flags(leakage, "recovered").groupby(number)
    reached, possible = _numbers(leakage, "mse"), _numbers(leakage, "limit_mse")
    return pd.DataFrame(
        {
            "label_accuracy": _numbers(attacks, "label_accuracy").groupby(_numbers(attacks, "round")).mean(),
            "hits": recovered.sum(),
            "images": recovered.count(),
            "median_psnr": _numbers(leakage, "psnr").groupby(number).median(),
            "reached_mse": reached.where(possible.notna()).groupby(number).median(),
            "possible_mse": possible.where(reached.notna()).groupby(number).median(),
        }
    )


def _tried(attacks: pd.DataFrame, leakage: pd.DataFrame) -> pd.DataFrame:
    """The rows of `leakage` less those of updates whose labels alone were attacked."""
    if "stop_reason" not in attacks or "client" not in attacks:
        return leakage
    updates = zip(attacks["round"], attacks["client"], strict=True)
    labels_only = {
        u for u, reason in zip(updates, attacks["stop_reason"], strict=True) if reason == StopReason.LABELS_ONLY
    }
    where = zip(leakage.get("round", []), leakage.get("client", []), strict=True)
    return leakage[[update not in labels_only for update in where]] if labels_only else leakage


def _numbers(table: pd.DataFrame, column: str) -> pd.Series:
    """A column as floats, NaN where it is empty; an empty column where the table lacks it."""
    values: Iterable[Any] = table.get(column, [])
    return pd.to_numeric(pd.Series(list(values)), errors="coerce").astype(float)


def _flags(table: pd.DataFrame, column: str) -> pd.Series:
    """A column of True, False (or 1, 0) and empty cells, in memory or read from a CSV file, as 1, 0 and NaN."""
    values: Iterable[Any] = table.get(column, [])
    meaning = {"True": 1.0, "False": 0.0, "1.0": 1.0, "0.0": 0.0, "1": 1.0, "0": 0.0}
    return pd.Series([meaning.get(str(value), np.nan) for value in values], dtype=float)


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
