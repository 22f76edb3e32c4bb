"""When a start has ended, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.attacks.results import StopReason

REASONS = (None, StopReason.CONVERGED, StopReason.DIVERGED, StopReason.STALLED, StopReason.BUDGET)
"""By the code that a start ends with; 0 goes on."""


@dataclass(frozen=True)
class Evaluated:
    """P starts where they were just evaluated.

    Attributes:
        images: ``[P, B, C, H, W]``.
        value: ``[P]``, the objective, priors included.
        gradient: ``[P, D]``, its derivative by the unknowns.
        best: ``[P]``, the lowest value so far.
        better: ``[P]``, whether that is this one.
        evaluations: ``[P]`` int64, this one included.
        guarded: whether the optimiser takes back a step to a worse point.
    """

    images: Tensor
    value: Tensor
    gradient: Tensor
    best: Tensor
    better: Tensor
    evaluations: Tensor
    guarded: bool


@dataclass
class Stopping:
    """Ends starts. A subclass in a file of your own, named by ``_target_``, may have other rules.

    Args:
        max_evaluations: objective-and-gradient evaluations per start, at most.
        tolerance: the objective at which a start has converged.
        patience: a start has stalled when its best objective fell by less than a thousandth over so many evaluations.
        limit: a start has diverged when the root mean square of (pixel − 0.5) exceeds this.
    """

    max_evaluations: int = 2000
    tolerance: float = 1e-6
    patience: int = 200
    limit: float = 10.0

    def init(self, x: Tensor) -> dict[str, Tensor]:
        """What is to be remembered of starts with unknowns `x` ``[P, D]``, one row each."""
        marked = torch.zeros(len(x), dtype=torch.long, device=x.device)
        # The best value when it last fell by a thousandth, and when that was.
        return {"mark": x.new_full((len(x),), torch.inf), "marked": marked}

    def judge(self, state: dict[str, Tensor], now: Evaluated) -> Tensor:
        """Codes ``[P]``, indices into `REASONS`; `state` is brought up to date in place."""
        fell = now.best < 0.999 * state["mark"]
        state["mark"] = torch.where(fell, now.best, state["mark"])
        state["marked"] = marked = torch.where(fell, now.evaluations, state["marked"])
        spread = (now.images - 0.5).flatten(1).square().mean(1).sqrt()
        sane = now.value.isfinite() & now.gradient.isfinite().all(1) & (spread <= self.limit)
        if now.guarded:
            sane = sane | ~now.better & (now.evaluations > 1)  # the step will be taken back
        code = torch.where(now.evaluations >= self.max_evaluations, 4, torch.zeros_like(now.evaluations))
        code = torch.where(now.evaluations - marked >= self.patience, 3, code)
        code = torch.where(sane, code, 2)
        return torch.where(now.best <= self.tolerance, 1, code)


@dataclass
class AsPublished(Stopping):
    """As the code of DLG and iDLG stops: it looks at the objective after every so many evaluations.

    A start that blew up is not ended for that; it may come back. One that `LBFGS` lets rest goes nowhere any more and
    has stalled, which saves the rest of the budget and changes no result.

    Args:
        max_evaluations, tolerance: as there; 300 steps are 6,001 evaluations.
        every: evaluations of a step of `torch.optim.LBFGS`.
    """

    every: int = 20
    patience: int = 1 << 62
    limit: float = float("inf")

    def init(self, x: Tensor) -> dict[str, Tensor]:
        """What is to be remembered: besides, the last objective and for how long it has been the same."""
        still = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return super().init(x) | {"last": x.new_full((len(x),), torch.inf), "still": still}

    def judge(self, state: dict[str, Tensor], now: Evaluated) -> Tensor:
        """Codes ``[P]``, as there."""
        code = super().judge(state, now)
        looks = (now.evaluations > 1) & ((now.evaluations - 1) % self.every == 0)
        code = torch.where(code == 1, torch.where(now.evaluations >= self.max_evaluations, 4, 0), code)
        state["still"] = torch.where(now.value == state["last"], state["still"] + 1, 0)
        state["last"] = now.value
        code = torch.where((code == 0) & (state["still"] >= self.every), 3, code)
        return torch.where(looks & (now.value < self.tolerance), 1, code)
