"""Join reconstructions with the truth: which rebuilt image belongs to which private one, the tables, the summary.

A missing truth is no error: its scores stay empty (None in a row, an empty CSV cell) and every row is still there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fedleak.attacks.results import Reconstruction, StopReason
from fedleak.evaluation.metrics import RECOVERED_MSE, assign, label_accuracy, labels_exact, mse, psnr, ssim
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
)
"""Columns of ``attacks.csv``, a row an observation."""

LEAKAGE_COLUMNS = ("round", "client", "image", "label_true", "label_inferred", "mse", "psnr", "ssim", "recovered")
"""Columns of ``leakage.csv``, a row an image."""


@dataclass(frozen=True)
class Frame:
    """An image on its way from the attack's start to what was rebuilt.

    Attributes:
        evaluations: of the objective, until then.
        image: the best so far, ``[C, H, W]`` in [0, 1].
        mse: between it and the private image, None without truth.
    """

    evaluations: int
    image: Tensor
    mse: float | None = None


@dataclass(frozen=True)
class Match:
    """One private image and what the attacker made of it; None where either is missing.

    Attributes:
        round, client: which observation.
        image: index within the private batch; without truth, index within the reconstruction.
        label_true: from the truth.
        label_inferred: the label that the attacker gave to the matched image.
        mse, psnr, ssim: of the pair.
        recovered: whether the MSE is below `RECOVERED_MSE`; False too for a private image that nothing was rebuilt
            of, None without truth.
        true, rebuilt: the images, ``[C, H, W]`` in [0, 1].
        frames: how `rebuilt` came about, the start first, itself last; empty where no snapshots were kept.
    """

    round: int
    client: int
    image: int
    label_true: int | None = None
    label_inferred: int | None = None
    mse: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    recovered: bool | None = None
    true: Tensor | None = None
    rebuilt: Tensor | None = None
    frames: tuple[Frame, ...] = ()

    def row(self) -> dict[str, Any]:
        """This pair as a row of ``leakage.csv``."""
        return {column: getattr(self, column) for column in LEAKAGE_COLUMNS}


def failed(reconstruction: Reconstruction) -> bool:
    """Whether there was nothing to attack or nothing came out of it (an unusable update, an attack that raised)."""
    return reconstruction.failed


def match(reconstruction: Reconstruction, truth: Truth | None, *, similarity: bool = True) -> list[Match]:
    """Pair each private image with the rebuilt one that is its own in the best assignment of the batch.

    Where no images were rebuilt (``labels_only``), labels found in both multisets are paired first, and the rest in
    order. Private images beyond the number of rebuilt ones are paired with None.

    Args:
        reconstruction: ``[B', C, H, W]`` images and ``[B']`` labels, either of them possibly empty.
        truth: the private batch, all local steps together, or None.
        similarity: whether to compute SSIM, by far the slowest of the metrics; without it, it is None.

    Returns:
        One `Match` for each private image, or, without truth, for each rebuilt one; none if the attack `failed`.

    Raises:
        ValueError: if the private and the rebuilt images differ in shape.
    """
    where = partial(Match, reconstruction.round, reconstruction.client)
    if failed(reconstruction):
        return []
    # An attack on labels alone may carry blank images to keep the shapes: they are not its result.
    rebuilt = reconstruction.images[: 0 if reconstruction.labels_only else None]
    inferred = [int(label) for label in reconstruction.labels]
    if truth is None:
        return [
            where(
                image=i,
                label_inferred=inferred[i] if i < len(inferred) else None,
                rebuilt=rebuilt[i] if i < len(rebuilt) else None,
                frames=_frames(reconstruction, i) if i < len(rebuilt) else (),
            )
            for i in range(max(len(rebuilt), len(inferred)))
        ]
    true_labels = [int(label) for label in truth.labels]
    if len(rebuilt) == 0:
        return [
            where(image=i, label_true=label, label_inferred=j, recovered=False, true=truth.images[i])
            for i, (label, j) in enumerate(zip(true_labels, _pair_labels(true_labels, inferred), strict=True))
        ]
    partner = assign(truth.images, rebuilt).tolist()
    paired = [(i, j) for i, j in enumerate(partner) if j >= 0]
    a, b = torch.stack([truth.images[i] for i, _ in paired]), torch.stack([rebuilt[j] for _, j in paired])
    similarities = ssim(a, b) if similarity else torch.full((len(a),), torch.nan)
    scores = dict(zip((i for i, _ in paired), zip(mse(a, b), psnr(a, b), similarities, strict=True), strict=True))
    matches = []
    for i, j in enumerate(partner):
        if j < 0:
            matches.append(where(image=i, label_true=true_labels[i], recovered=False, true=truth.images[i]))
            continue
        error, decibels, structural = (float(score) for score in scores[i])
        matches.append(
            where(
                image=i,
                label_true=true_labels[i],
                label_inferred=inferred[j] if j < len(inferred) else None,
                mse=error,
                psnr=decibels,
                ssim=None if math.isnan(structural) else structural,
                recovered=error < RECOVERED_MSE,
                true=truth.images[i],
                rebuilt=rebuilt[j],
                frames=_frames(reconstruction, j, truth.images[i], error),
            )
        )
    return matches


def _frames(
    reconstruction: Reconstruction, index: int, truth: Tensor | None = None, error: float | None = None
) -> tuple[Frame, ...]:
    """The way of one rebuilt image, judged by the private image `truth` that its end, `error` away, belongs to."""
    if not reconstruction.snapshots:
        return ()
    counts = [evaluations for evaluations, _ in reconstruction.snapshots]
    images = [snapshot[index] for _, snapshot in reconstruction.snapshots]
    images[-1] = reconstruction.images[index]  # the snapshot of it is rounded
    errors: list[float | None] = [None] * len(images)
    if truth is not None:
        before = torch.stack([image.float() for image in images])
        errors = [*mse(truth.expand_as(before), before).tolist()[:-1], error]
    return tuple(map(Frame, counts, images, errors))


def score(
    reconstruction: Reconstruction,
    truth: Truth | None,
    *,
    attack: str,
    defense: str,
    batch_size: int | None,
    update_residual: float | None,
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
        matches: what `match` made of the two, where it is at hand already.

    Returns:
        The row of ``attacks.csv`` (`ATTACK_COLUMNS`) and the rows of ``leakage.csv`` (`LEAKAGE_COLUMNS`).
    """
    judged = truth is not None and len(truth.labels) > 0 and not failed(reconstruction)
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
    }
    return row, [pair.row() for pair in (match(reconstruction, truth) if matches is None else matches)]


def summarise(attacks: pd.DataFrame, leakage: pd.DataFrame, rounds: pd.DataFrame) -> dict[str, Any]:
    """The run in a few numbers, as plain JSON: no NaN and no inf; None where nothing was measured.

    Args:
        attacks: rows of ``attacks.csv``, built in memory or read back.
        leakage: rows of ``leakage.csv``.
        rounds: rows of ``rounds.csv``.

    Returns:
        ``rounds``, ``final_test_accuracy``; ``observations`` (attacked), ``failed`` (of these, without any result),
        ``label_accuracy`` (mean over observations), ``whole_batch_rate`` (share of observations with every label
        right); ``images`` (that were scored), ``recovered``, ``recovered_rate``, ``median_mse``, ``median_psnr`` (dB;
        None where the median image is exact, that is infinite); ``evaluations`` and ``attack_seconds`` (totals);
        ``stop_reasons`` (count of each).
    """
    recovered = _flags(leakage, "recovered").dropna()
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
        "median_mse": _plain(_numbers(leakage, "mse").median()),
        "median_psnr": _plain(_numbers(leakage, "psnr").median()),
        "evaluations": int(_numbers(attacks, "evaluations").sum()),
        "attack_seconds": _plain(_numbers(attacks, "seconds").sum()),
        "stop_reasons": {str(reason): int(count) for reason, count in reasons.value_counts().items()},
    }


def round_table(rounds: pd.DataFrame, attacks: pd.DataFrame, leakage: pd.DataFrame, *, most: int = 12) -> pd.DataFrame:
    """What a run prints at its end: utility and leakage, round by round.

    Args:
        rounds, attacks, leakage: the three tables.
        most: beyond this many rounds, only those that were attacked and the last one are listed.

    Returns:
        ``round``, ``test_accuracy``, ``label_accuracy`` (mean over the round's observations) and ``recovered`` as
        ``k / n`` images; NaN and an empty string where nothing was attacked, no image tried or no truth known.
    """
    labels = _numbers(attacks, "label_accuracy").groupby(_numbers(attacks, "round")).mean()
    leakage = _tried(attacks, leakage)
    flags = _flags(leakage, "recovered").groupby(_numbers(leakage, "round"))
    hits, known = flags.sum(), flags.count()
    table = pd.DataFrame({"round": _numbers(rounds, "round"), "test_accuracy": _numbers(rounds, "test_accuracy")})
    table["round"] = table["round"].astype(int)
    table["label_accuracy"] = table["round"].map(labels)
    table["recovered"] = [
        f"{int(hits[number])} / {int(known[number])}" if known.get(number, 0) else "" for number in table["round"]
    ]
    if len(table) > most:
        attacked = table["round"].isin(_numbers(attacks, "round"))
        table = table[attacked | (table.index == table.index[-1])]
    return table.reset_index(drop=True)


def leakage_by_round(attacks: pd.DataFrame, leakage: pd.DataFrame) -> dict[int, dict[str, float]]:
    """What leaked in each attacked round.

    Args:
        attacks, leakage: the tables.

    Returns:
        round -> ``label_accuracy`` (mean over the round's observations), ``recovered`` (share of its images) and
        ``median_psnr`` (dB, inf where exact); NaN where the truth is missing or no image was tried.
    """
    leakage = _tried(attacks, leakage)
    number = _numbers(leakage, "round")
    table = pd.DataFrame(
        {
            "label_accuracy": _numbers(attacks, "label_accuracy").groupby(_numbers(attacks, "round")).mean(),
            "recovered": _flags(leakage, "recovered").groupby(number).mean(),
            "median_psnr": _numbers(leakage, "psnr").groupby(number).median(),
        }
    )
    return {int(round): {str(k): float(v) for k, v in row.items()} for round, row in table.iterrows()}  # type: ignore[call-overload]


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


def _pair_labels(true: list[int], inferred: list[int]) -> list[int | None]:
    """For each true label the inferred one it is paired with: equal ones first, then whatever is left, in order."""
    left = list(inferred)
    partner: list[int | None] = [None] * len(true)
    for i, label in enumerate(true):
        if label in left:
            left.remove(label)
            partner[i] = label
    for i in range(len(true)):
        if partner[i] is None and left:
            partner[i] = left.pop(0)
    return partner


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
