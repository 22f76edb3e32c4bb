"""Batched optimisers: P independent problems step together, each with its own state.

An optimiser is a pair of functions in the manner of optax: `init` makes a state, `step` reads a gradient and moves.
Every tensor of a state has the problems as its first dimension, so a caller drops, adds or restarts problems by
indexing; no step of one problem reads another problem's row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

State = dict[str, Tensor]


class Optimizer(ABC):
    """Minimises P functions of D unknowns at once, one evaluation of value and gradient per step."""

    guarded = False
    """Whether a step to a worse point is taken back, so that a wild one is no sign of divergence."""

    @abstractmethod
    def init(self, x: Tensor) -> State:
        """The state of problems that start at `x` ``[P, D]``; every tensor has leading dimension P."""

    @abstractmethod
    def step(self, state: State, x: Tensor, value: Tensor, gradient: Tensor, progress: Tensor) -> Tensor:
        """The next points to evaluate, ``[P, D]``; `state` is updated in place.

        Args:
            state: from `init`, for these P problems.
            x: ``[P, D]``, the points that were evaluated.
            value: ``[P]``, the function there.
            gradient: ``[P, D]``, its gradient there.
            progress: ``[P]`` in [0, 1), the share of each problem's evaluation budget that is used up.
        """


class LBFGS(Optimizer):
    """Limited-memory BFGS that follows the path of `torch.optim.LBFGS`, for many problems at once.

    The direction comes from the compact representation (Byrd, Nocedal, Schnabel 1994): two passes over the history as
    matrix products, instead of a loop over the m stored pairs. Of the upper triangular ⟨s_i, y_j⟩, i no newer than j,
    the inverse is kept: a new pair adds a column to it, and the oldest leaves with its row and column, which are the
    first. So its order is of no account, and pairs stay where the ring has them.

    Args:
        lr: step length; 1 as in DLG and iDLG.
        history_size: pairs (s, y) kept; memory is 2 · history_size · D numbers per problem.
        line_search: None takes every step; ``backtracking`` halves a step until the value falls enough (Armijo).
        max_step: longest change of any one unknown in a step, None for no limit.
        rests: as `torch.optim.LBFGS`, take no step where the gradient's largest element is at most 1e-7, or where the
            slope along the direction is above −1e-9.
    """

    def __init__(
        self,
        *,
        lr: float = 1.0,
        history_size: int = 100,
        line_search: Literal["backtracking"] | None = None,
        max_step: float | None = None,
        rests: bool = False,
    ) -> None:
        self.rests = rests
        self.lr = lr
        self.history_size = history_size
        self.line_search = line_search
        self.guarded = line_search is not None
        self.max_step = max_step

    def init(self, x: Tensor) -> State:
        """Empty histories for problems that start at `x` ``[P, D]``."""
        problems, unknowns = x.shape
        m = self.history_size
        state = {
            "count": x.new_zeros(problems, dtype=torch.long),  # pairs ever stored
            "steps": x.new_zeros(problems, dtype=torch.long),
            "pairs": x.new_zeros(problems, 2, m, unknowns),  # s and y, a ring in `count % m`
            "inverse": x.new_zeros(problems, m, m, dtype=_wide(x)),  # of ⟨s_i, y_j⟩, for i stored before or with j
            "yy": x.new_zeros(problems, m, m, dtype=_wide(x)),
            "sy": x.new_zeros(problems, m, dtype=_wide(x)),  # ⟨s_i, y_i⟩
            "gamma": x.new_ones(problems),
            "gradient": torch.zeros_like(x),  # of the last accepted point
            "move": torch.zeros_like(x),  # last step: x - last accepted point
        }
        if self.line_search is not None:
            state |= {
                "value": x.new_full((problems,), torch.inf),
                "slope": x.new_zeros(problems),  # ⟨gradient, move⟩
                "halvings": x.new_zeros(problems, dtype=torch.long),
            }
        return state

    def step(self, state: State, x: Tensor, value: Tensor, gradient: Tensor, progress: Tensor) -> Tensor:
        """One L-BFGS step (or one halving of the last step) for every problem."""
        first = state["steps"] == 0
        if self.line_search is None:
            accepted = torch.ones_like(first)
        else:
            enough = value <= state["value"] + 1e-4 * state["slope"]
            accepted = enough | first | (state["halvings"] >= 20)
        s, y = state["move"], gradient - state["gradient"]
        learned = self._remember(state, s, y, accepted & ~first)
        length = torch.where(first, (1 / gradient.abs().sum(1)).clamp_max(1.0), 1.0) * self.lr
        move = length[:, None] * self._direction(state, gradient, y, learned)
        if self.max_step is not None:
            move = move * (self.max_step / move.abs().amax(1, keepdim=True)).clamp_max(1.0)
        if self.rests:
            moves = (gradient.abs().amax(1) > 1e-7) & ((gradient * move).sum(1) <= -1e-9 * length)
            move = torch.where(moves[:, None], move, 0.0)
        if self.line_search is None:
            state |= {"steps": state["steps"] + 1, "gradient": gradient, "move": move}
            return x + move
        keep = accepted[:, None]
        halved = s / 2
        slope = torch.where(accepted, (gradient * move).sum(1), state["slope"] / 2)
        state |= {
            "steps": state["steps"] + accepted,
            "gradient": torch.where(keep, gradient, state["gradient"]),
            "move": torch.where(keep, move, halved),
            "value": torch.where(accepted, value, state["value"]),
            "slope": slope,
            "halvings": torch.where(accepted, 0, state["halvings"] + 1),
        }
        return torch.where(keep, x + move, x - halved)  # rejected: back to the middle of the last step

    def _remember(self, state: State, s: Tensor, y: Tensor, wanted: Tensor) -> Tensor:
        """Store (s, y) where wanted and the curvature is positive enough (torch.optim.LBFGS's rule); say where."""
        ys = (s * y).sum(1)
        learn = wanted & (ys > 1e-10)
        rows = learn.nonzero().squeeze(1)
        slots = state["count"][rows] % self.history_size
        state["pairs"][rows, 0, slots] = s[rows]
        state["pairs"][rows, 1, slots] = y[rows]
        state["gamma"] = torch.where(learn, ys / y.square().sum(1), state["gamma"])
        state["count"] = state["count"] + learn
        return learn

    def _direction(self, state: State, gradient: Tensor, y: Tensor, learned: Tensor) -> Tensor:
        """−H·g, ``[P, D]``; also brings the table of inner products up to date with the newest pair."""
        used = int(state["count"].max().clamp_max(self.history_size))
        gamma = state["gamma"][:, None]
        if used == 0:
            return -gamma * gradient
        # One pass over the history gives its products with the gradient and with the newest y.
        history, wide = state["pairs"][:, :, :used], state["yy"].dtype
        probes = torch.stack([gradient, y], 1).mT
        with_s, with_y = ((history[:, k] @ probes).to(wide) for k in (0, 1))
        self._tabulate(state, with_s[..., 1], with_y[..., 1], learned)
        by_s, by_y = self._coefficients(state, with_s[..., 0], with_y[..., 0], used)
        direction = -gamma * gradient
        for k, by in enumerate((by_s, by_y)):
            direction -= torch.bmm(by.to(y.dtype)[:, None], history[:, k]).squeeze(1)
        return direction

    def _tabulate(self, state: State, s_y: Tensor, y_y: Tensor, learned: Tensor) -> None:
        """Take the newest pair into the tables, where one was learned: its products ``[P, used]`` with all pairs."""
        used, rows, new = s_y.shape[1], torch.arange(len(s_y), device=s_y.device), learned[:, None]
        slot = (state["count"] - 1).clamp_min(0) % self.history_size
        yy, inverse, ys = state["yy"], state["inverse"], s_y[rows, slot]
        yy[rows, :used, slot] = torch.where(new, y_y, yy[rows, :used, slot])
        yy[rows, slot] = yy[rows, :, slot]
        state["sy"][rows, slot] = torch.where(learned, ys, state["sy"][rows, slot])
        inverse[rows, slot] = torch.where(new, 0.0, inverse[rows, slot])  # the oldest pair leaves, if the ring is full
        older = s_y.scatter(1, slot[:, None], 0.0)
        column = -(inverse[:, :used, :used] @ older[..., None]).squeeze(2).scatter(1, slot[:, None], -1.0)
        inverse[rows, :used, slot] = torch.where(new, column / ys[:, None], inverse[rows, :used, slot])

    @staticmethod
    def _coefficients(state: State, s_g: Tensor, y_g: Tensor, used: int) -> tuple[Tensor, Tensor]:
        """What each s and y is multiplied with in H·g − γ·g, ``[P, used]`` each, in ring order."""
        inverse, yy = state["inverse"][:, :used, :used], state["yy"][:, :used, :used]
        gamma = state["gamma"].to(yy.dtype)[:, None]
        u = (inverse @ s_g[..., None]).squeeze(2)
        right = state["sy"][:, :used] * u + gamma * ((yy @ u[..., None]).squeeze(2) - y_g)
        return (inverse.mT @ right[..., None]).squeeze(2), -gamma * u


class Adam(Optimizer):
    """Adam (Kingma 2015), optionally on the sign of the gradient with step drops (Geiping 2020).

    Args:
        lr: step length, in image units.
        betas: decay of the running mean and of the running square.
        eps: added to the root of the running square.
        signed: step on the sign of the gradient.
        schedule: ``constant``, or ``drops``: a tenth of the step after 3/8, 5/8 and 7/8 of the budget each.
    """

    def __init__(
        self,
        *,
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        signed: bool = False,
        schedule: Literal["constant", "drops"] = "constant",
    ) -> None:
        self.lr = lr
        self.betas = (betas[0], betas[1])
        self.eps = eps
        self.signed = signed
        self.schedule = schedule

    def init(self, x: Tensor) -> State:
        """Zero moments for problems that start at `x` ``[P, D]``."""
        steps = torch.zeros(x.shape[0], dtype=_wide(x), device=x.device)
        return {"steps": steps, "mean": torch.zeros_like(x), "square": torch.zeros_like(x)}

    def step(self, state: State, x: Tensor, value: Tensor, gradient: Tensor, progress: Tensor) -> Tensor:
        """One Adam step for every problem."""
        if self.signed:
            gradient = gradient.sign()
        first, second = self.betas
        state["steps"] += 1
        state["mean"].mul_(first).add_(gradient, alpha=1 - first)
        state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        correction = (1 - second ** state["steps"]).sqrt()
        lr = self.lr / (1 - first ** state["steps"])
        if self.schedule == "drops":
            drops = sum((progress >= at).to(lr.dtype) for at in (3 / 8, 5 / 8, 7 / 8))
            lr = lr * 0.1**drops
        denominator = state["square"].sqrt() / correction[:, None].to(x.dtype) + self.eps
        return x - lr[:, None].to(x.dtype) * state["mean"] / denominator


def _wide(x: Tensor) -> torch.dtype:
    """What scalars are kept in: double precision where the device has it."""
    return x.dtype if x.device.type == "mps" else torch.float64
