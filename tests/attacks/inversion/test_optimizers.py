"""Batched optimisers walk the path of torch.optim's, whatever runs beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedleak.attacks.inversion.optimizers import LBFGS, Adam, Optimizer

DIMENSION = 30


def problem(seed: int = 0) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A smooth, badly scaled, non-quadratic function of [P, 30], and three starts."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(DIMENSION, DIMENSION, generator=generator, dtype=torch.float64) / 5
    scale = torch.logspace(-1, 0.5, DIMENSION, dtype=torch.float64)
    starts = torch.randn(3, DIMENSION, generator=generator, dtype=torch.float64)
    return lambda x: (((x @ matrix).tanh() - 0.3) ** 2 * scale).sum(-1) + 0.01 * (x**4).sum(-1), starts


def walk(optimizer: Optimizer, function: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> Tensor:
    """The points that were evaluated, [steps, P, D]."""
    state, path = optimizer.init(x), []
    for step in range(steps):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        path.append(x.clone())
        x = optimizer.step(state, x, value.detach(), gradient, torch.full((len(x),), step / steps))
    return torch.stack(path)


def torch_walk(make: Callable[[list[Tensor]], torch.optim.Optimizer], function, start: Tensor, steps: int) -> Tensor:
    x = start.clone().requires_grad_()
    optimizer, path = make([x]), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        path.append(x.detach().clone())
        value = function(x)
        value.backward()
        return value

    while len(path) < steps:
        optimizer.step(closure)
    return torch.stack(path[:steps])


@pytest.mark.parametrize("history", [4, 100])
@pytest.mark.parametrize("inner", [20, 1000])
def test_lbfgs_walks_the_path_of_torch_optim(history: int, inner: int) -> None:
    function, starts = problem()
    ours = walk(LBFGS(lr=0.5, history_size=history), function, starts, 60)
    for row, start in enumerate(starts):
        theirs = torch_walk(
            lambda p: torch.optim.LBFGS(
                p, lr=0.5, history_size=history, max_iter=inner, tolerance_grad=0, tolerance_change=0
            ),
            function,
            start,
            60,
        )
        torch.testing.assert_close(ours[:, row], theirs, rtol=1e-6, atol=1e-6)
    assert (ours[-1] - ours[0]).abs().max() > 0.1  # they went somewhere


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_adam_walks_the_path_of_torch_optim(betas: tuple[float, float]) -> None:
    function, starts = problem()
    ours = walk(Adam(lr=0.05, betas=betas), function, starts, 60)
    for row, start in enumerate(starts):
        theirs = torch_walk(lambda p: torch.optim.Adam(p, lr=0.05, betas=betas), function, start, 60)
        torch.testing.assert_close(ours[:, row], theirs, rtol=1e-10, atol=1e-10)


def test_signed_adam_sees_only_signs_and_drops_its_step() -> None:
    function, starts = problem()
    ours = walk(Adam(lr=0.1, signed=True, schedule="drops"), function, starts, 64)
    scaled = walk(Adam(lr=0.1, signed=True, schedule="drops"), lambda x: 1e3 * function(x), starts, 64)
    torch.testing.assert_close(ours, scaled)
    steps = (ours[1:] - ours[:-1]).abs().amax((1, 2))
    assert steps[23] > 8 * steps[24]  # 24 = 3/8 of 64
    assert steps[55] > 8 * steps[56]


@pytest.mark.parametrize("optimizer", [LBFGS(history_size=5), LBFGS(line_search="backtracking"), Adam()])
def test_rows_do_not_read_each_other(optimizer: Optimizer) -> None:
    function, starts = problem()
    together = walk(optimizer, function, starts, 30)

    def poisoned(x: Tensor) -> Tensor:
        value = function(x)
        return torch.cat([value[:1] * float("nan"), value[1:]])

    beside_nan = walk(optimizer, poisoned, starts, 30)
    assert torch.equal(beside_nan[:, 1:], together[:, 1:])
    assert beside_nan[1:, 0].isnan().all()
    alone = torch.cat([walk(optimizer, function, start[None], 30) for start in starts], 1)
    torch.testing.assert_close(alone, together, rtol=1e-7, atol=1e-7)


def test_rows_may_be_replaced_and_dropped() -> None:
    function, starts = problem()
    reference = walk(LBFGS(history_size=6), function, starts[1:2], 30)
    optimizer, x = LBFGS(history_size=6), starts.clone()
    state, path = optimizer.init(x), []
    for step in range(40):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf)
        x = optimizer.step(state, x, function(x), gradient, torch.zeros(len(x)))
        if step == 9:  # problem 0 begins anew from start 1, the others go on
            fresh = optimizer.init(starts[1:2])
            x[0] = starts[1]
            for name in state:
                state[name][0] = fresh[name][0]
        if step == 19:  # problem 1 leaves
            x = x[[0, 2]]
            state = {name: value[[0, 2]] for name, value in state.items()}
        if step >= 9:
            path.append(x[0].clone())
    torch.testing.assert_close(torch.stack(path)[:30], reference[:, 0], rtol=1e-7, atol=1e-7)


def test_backtracking_never_goes_up_and_survives_infinity() -> None:
    def cliff(x: Tensor) -> Tensor:
        """Rosenbrock's valley in pairs, infinite outside a box that full steps leave."""
        a, b = x[:, 0::2], x[:, 1::2]
        inside = x.abs().amax(1) < 3
        return torch.where(inside, (100 * (b - a**2) ** 2 + (1 - a) ** 2).sum(1), torch.inf)

    starts = torch.tensor([[-1.2, 1.0] * 5, [0.0, 2.0] * 5], dtype=torch.float64)
    path = walk(LBFGS(line_search="backtracking"), cliff, starts, 300)
    values = torch.stack([cliff(x) for x in path])
    assert values[-1].max() < 1e-12
    best = values.cummin(0).values
    rejected = values > best
    assert (~rejected).sum() > 60
    assert rejected.any()


def test_step_limit_holds() -> None:
    function, starts = problem()
    path = walk(LBFGS(max_step=0.05), function, 3 * starts, 20)
    longest = (path[1:] - path[:-1]).abs().amax(2)
    assert longest.max() <= 0.05 + 1e-12
    assert (longest > 0.049).any()
