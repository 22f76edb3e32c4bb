"""How large an update should be: whether it was clipped, and what its class counts say of its scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge
from fedleak.attacks.labels.counting import round_counts
from fedleak.attacks.labels.last_layer import LastLayer
from fedleak.audit.checks import CONSISTENT, CONTRADICTS, UNKNOWN, Draft
from fedleak.audit.lattice import expected_error, find_factor, misfit, path
from fedleak.training import SGD, LocalTraining

CLIP_KEYS = ("clipping_norm", "clipping-norm")
"""Under which Flower's strategies tell their clients the norm to clip to."""


@dataclass(frozen=True)
class Claimed:
    """The class counts that a last layer claims, rounded, and how far they may be off, root mean square."""

    counts: tuple[int, ...]
    error: float


def common_norm(drafts: Sequence[Draft]) -> float | None:
    """The norm that several updates share, as clipped ones do; None if they do not."""
    norms = [d.norm() for d in drafts if d.why is None and d.trace is not None and d.trace.kind in ("linear", "decay")]
    if len(norms) < 2:
        return None
    norms.sort()
    # Two that agree may be chance; clipped ones agree to the rounding of the weights, and are many.
    alike = [[n for n in norms if abs(n / one - 1) < 2e-4] for one in norms]
    most = max(alike, key=len)
    enough = len(most) == len(norms) and most[-1] / most[0] - 1 < 1e-4
    return most[len(most) // 2] if enough or len(most) >= max(3, 0.3 * len(norms)) else None


def find_scale(
    draft: Draft,
    knowledge: Knowledge,
    layer: LastLayer,
    training: LocalTraining,
    clip: float | None,
    errors: dict[object, float],
    seed: int,
) -> tuple[float, Claimed | None]:
    """Whether the update's class counts are whole numbers from zero; else what factor makes them so."""
    blind = training.optimizer is None and training.payload == "weights"
    trial = replace(training, optimizer=SGD(1.0)) if blind else training
    found = path(layer, draft.start, draft.change, trial)
    if found is None:
        draft.say("scale", UNKNOWN, "cannot be checked: the last layer has no bias, or the training is not known")
        return 1.0, None
    uneven = getattr(training.optimizer, "momentum", 0.0) and (training.steps or 1) > 1
    if clip is not None or blind:
        factor = None if uneven else find_factor(found)
        if factor is None:
            draft.say("scale", UNKNOWN, "the update was scaled by an unknown factor, and none stands out")
            return 1.0, None
        draft.say("scale", CONSISTENT, f"{factor[0]:.4g} times larger, the update claims whole numbers of samples")
        return factor[0], Claimed(_whole(found.counts(torch.tensor([factor[0]], dtype=torch.float64))[0]), 0.0)
    if draft.payload == "gradient" or training.samples is None:
        trial = replace(training, payload="gradient")
    key = (draft.exchange.round, trial)
    if key not in errors:
        errors[key] = expected_error(layer, knowledge, draft.start, draft.buffers, trial, seed=seed, size=draft.norm())
    doubt = errors[key] + 0.015 * found.samples * found.spread
    claimed = found.counts(torch.ones(1, dtype=torch.float64))
    least, most, off = float(claimed.min()), float(claimed.max()), float(misfit(claimed)[0])
    if least < -max(0.7, 4 * doubt):
        draft.say("scale", CONTRADICTS, f"this would mean {least:.1f} samples of a class: {_blame(training)}")
    elif 0.2 <= doubt < 0.02 * found.samples and found.too_small:
        words = f"the classes would be more even than chance makes them: {_blame(training)}"
        draft.say("scale", CONTRADICTS, f"{words}, unless the client's data are balanced to the sample")
    elif uneven:
        sure = UNKNOWN if doubt > 0.1 * found.samples else CONSISTENT
        draft.say("scale", sure, f"from {least:.0f} to {most:.0f} samples of a class")
    elif doubt < 0.2 and off > 0.2:
        draft.say("scale", CONTRADICTS, f"this would mean fractions of samples ({off:.2f} off): {_blame(training)}")
    elif doubt < 0.2:
        draft.say("scale", CONSISTENT, f"the update holds whole numbers of samples ({off:.2f} off)")
        return 1.0, Claimed(_whole(claimed[0]), 0.0)
    else:
        draft.say("scale", UNKNOWN, "possible, but not told exactly")
    counts = round_counts(claimed, torch.tensor([found.samples]))[0]
    return 1.0, Claimed(tuple(counts.tolist()), math.hypot(0.6 * doubt, found.mixing))  # doubt is on the safe side


def _blame(training: LocalTraining) -> str:
    return (
        "the batch size or the number of steps is wrong"
        if training.payload == "gradient"
        else "the learning rate, the momentum, the batch size or the number of steps is wrong, or the update was scaled"
    )


def _whole(counts: Tensor) -> tuple[int, ...]:
    return tuple(int(c) for c in counts.round().clamp(min=0).tolist())
