"""How an objective depends on the gradients of a chain, through inner products of each parameter tensor alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Products:
    """Collects the inner products of every parameter tensor, and then says how the objective depends on them.

    Attributes:
        dd, dt, tt: name -> ``[P]``, ‖G − T‖², ⟨G − T, T⟩ and ‖T‖².
        by_d, by_t: name -> ``[P]``: ∂objective/∂G = by_d · (G − T) + by_t · T.
    """

    def __init__(self) -> None:
        self.dd: dict[str, Tensor] = {}
        self.dt: dict[str, Tensor] = {}
        self.tt: dict[str, Tensor] = {}
        self.by_d: dict[str, Tensor] = {}
        self.by_t: dict[str, Tensor] = {}

    def add(self, name: str, gap: Tensor, target: Tensor) -> None:
        """Book an explicit difference G − T, both ``[P, ...]``."""
        gap, target = gap.flatten(1), target.flatten(1)
        self.dd[name] = gap.square().sum(1)
        self.dt[name] = (gap * target).sum(1)
        self.tt[name] = target.square().sum(1)

    def judge(self, objective: Callable[[Tensor, Tensor, Tensor], Tensor], names: Sequence[str]) -> Tensor:
        """The objective ``[P]``, and its derivatives into `by_d` and `by_t`."""
        dd, dt, tt = (torch.stack([table[name] for name in names], 1) for table in (self.dd, self.dt, self.tt))
        with torch.enable_grad():
            dd, dt = dd.requires_grad_(), dt.requires_grad_()
            value = objective(dd, dt, tt)
            by_dd, by_dt = torch.autograd.grad(value.sum(), (dd, dt), allow_unused=True, materialize_grads=True)
        for column, name in enumerate(names):
            self.by_d[name] = 2 * by_dd[:, column]
            self.by_t[name] = by_dt[:, column]
        self.blind = not by_dt.any()  # the objective does not look at ⟨G − T, T⟩, as L2 does not
        return value.detach()

    def pull(self, name: str, gap: Tensor, target: Tensor) -> Tensor:
        """∂objective/∂G of an explicit difference."""
        shape = (-1,) + (1,) * (gap.dim() - 1)
        pulled = self.by_d[name].view(shape) * gap
        return pulled if self.blind else pulled + self.by_t[name].view(shape) * target
