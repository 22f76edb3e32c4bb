"""Which rebuilt image belongs to which private one: the best assignment of a batch, and how close each pair is.

A missing truth is no error: the scores stay None, and every rebuilt image is still there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedleak.attacks.results import Reconstruction
from fedleak.evaluation.metrics import RECOVERED_MSE, mse, psnr, ssim
from fedleak.truth import Truth

T = TypeVar("T")

LEAKAGE_COLUMNS = (
    "round",
    "client",
    "image",
    "label_true",
    "label_inferred",
    "mse",
    "psnr",
    "ssim",
    "recovered",
    "limit_mse",
    "expected_mse",
)
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
        limit_mse: the least error that anyone could have expected of this image, given all that the update tells; None
            where no limit was computed.
        expected_mse: the attacker's own estimate of `mse`, made without the truth; None where it makes none.
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
    limit_mse: float | None = None
    expected_mse: float | None = None
    true: Tensor | None = None
    rebuilt: Tensor | None = None
    frames: tuple[Frame, ...] = ()

    def row(self) -> dict[str, Any]:
        """This pair as a row of ``leakage.csv``."""
        return {column: getattr(self, column) for column in LEAKAGE_COLUMNS}


def match(
    reconstruction: Reconstruction, truth: Truth | None, *, similarity: bool = True, limit_mse: Tensor | None = None
) -> list[Match]:
    """Pair each private image with the rebuilt one that is its own in the best assignment of the batch.

    Where no images were rebuilt (``labels_only``), labels found in both multisets are paired first, and the rest in
    order. Private images beyond the number of rebuilt ones are paired with None.

    Args:
        reconstruction: ``[B', C, H, W]`` images and ``[B']`` labels, either of them possibly empty; where its
            `details` hold ``expected_mse``, a list of numbers or numbers between spaces, one for each image, they are
            the attacker's own expected errors.
        truth: the private batch, all local steps together, or None.
        similarity: whether to compute SSIM, by far the slowest of the metrics; without it, it is None.
        limit_mse: ``[B]``, the limit of each image of `truth`, not finite where it has none; None if not computed.

    Returns:
        One `Match` for each private image, or, without truth, for each rebuilt one; none if it `failed`.

    Raises:
        ValueError: if the private and the rebuilt images differ in shape, or the limits are not one for each image.
    """
    if reconstruction.failed:
        return []
    # An attack on labels alone may carry blank images to keep the shapes: they are not its result.
    rebuilt = reconstruction.images[: 0 if reconstruction.labels_only else None]
    inferred = [int(label) for label in reconstruction.labels]
    expected = _numbers(reconstruction.details.get("expected_mse", ()))
    if truth is None:
        return [
            Match(
                reconstruction.round,
                reconstruction.client,
                image=i,
                label_inferred=_at(inferred, i),
                expected_mse=_at(expected, i) if i < len(rebuilt) else None,
                rebuilt=rebuilt[i] if i < len(rebuilt) else None,
                frames=_frames(reconstruction, i) if i < len(rebuilt) else (),
            )
            for i in range(max(len(rebuilt), len(inferred)))
        ]
    true_labels = [int(label) for label in truth.labels]
    limits = [None] * len(true_labels) if limit_mse is None else _numbers(limit_mse.tolist())
    alone = [
        partial(Match, reconstruction.round, reconstruction.client, i, label, true=image, limit_mse=limit)
        for i, (label, image, limit) in enumerate(zip(true_labels, truth.images, limits, strict=True))
    ]
    if len(rebuilt) == 0:
        partners = _pair_labels(true_labels, inferred)
        return [one(label_inferred=label, recovered=False) for one, label in zip(alone, partners, strict=True)]
    partner = assign(truth.images, rebuilt).tolist()
    paired = [(i, j) for i, j in enumerate(partner) if j >= 0]
    a, b = torch.stack([truth.images[i] for i, _ in paired]), torch.stack([rebuilt[j] for _, j in paired])
    similarities = ssim(a, b).tolist() if similarity else [math.nan] * len(a)
    scores = zip(mse(a, b).tolist(), psnr(a, b).tolist(), similarities, strict=True)
    pairs = {
        i: alone[i](
            label_inferred=_at(inferred, j),
            mse=error,
            psnr=decibels,
            ssim=None if math.isnan(structural) else structural,
            recovered=error < RECOVERED_MSE,
            expected_mse=_at(expected, j),
            rebuilt=rebuilt[j],
            frames=_frames(reconstruction, j, truth.images[i], error),
        )
        for (i, j), (error, decibels, structural) in zip(paired, scores, strict=True)
    }
    return [pairs[i] if i in pairs else one(recovered=False) for i, one in enumerate(alone)]


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


def assign(truth: Tensor, rebuilt: Tensor) -> Tensor:
    """Match rebuilt images to true ones so that the sum of the squared errors is the least possible.

    The order within a batch cannot be seen in its update, so a reconstruction's own order means nothing.

    Args:
        truth: ``[B, C, H, W]``.
        rebuilt: ``[B', C, H, W]``; B' may differ from B.

    Returns:
        ``[B]`` int64: entry i is the index in `rebuilt` of the image matched to ``truth[i]``, or -1 if it got none.
        No image of `rebuilt` is matched twice.

    Raises:
        ValueError: if the images' shapes differ.
    """
    if truth.shape[1:] != rebuilt.shape[1:]:
        raise ValueError(f"cannot compare images {tuple(truth.shape[1:])} with images {tuple(rebuilt.shape[1:])}")
    matched = torch.full((len(truth),), -1, dtype=torch.int64)
    if len(truth) == 0 or len(rebuilt) == 0:
        return matched
    if len(truth) == len(rebuilt) == 1:
        return torch.zeros(1, dtype=torch.int64)
    from scipy.optimize import linear_sum_assignment  # late: a run with single images need not wait for it
    from scipy.spatial.distance import cdist

    flat = (images.detach().cpu().double().flatten(1).numpy() for images in (truth, rebuilt))
    # The solver refuses infinite costs; an image that is not finite is the worst match there is, yet still one.
    costs = np.nan_to_num(cdist(*flat, "sqeuclidean"), nan=1e30, posinf=1e30).clip(max=1e30)
    rows, columns = linear_sum_assignment(costs)
    matched[torch.as_tensor(rows)] = torch.as_tensor(columns)
    return matched


def _at(values: Sequence[T], index: int) -> T | None:
    return values[index] if index < len(values) else None


def _numbers(said: Sequence[Any] | str | float) -> list[float | None]:
    """Numbers in a list, between spaces or alone; None for those that are not finite."""
    values = said.split() if isinstance(said, str) else [said] if isinstance(said, int | float) else said
    return [value if math.isfinite(value) else None for value in map(float, values)]
