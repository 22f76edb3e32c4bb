"""What an answer is worth: whether it explains its update, how large the noise is, how wrong the images must be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedleak.attacks.chain.base import Dense, Rows
from fedleak.attacks.image_prior import ImagePrior
from fedleak.attacks.inversion.map.solver import GaussNewton, State
from fedleak.attacks.jacobian.base import dense
from fedleak.attacks.noise import Noise
from fedleak.attacks.results import StopReason

EXPLAINED = 3.0
"""The misfit up to which the images explain the update: 1 is what noise alone leaves."""
_LARGE = 200
"""Elements from which a tensor's residual tells the size of its own noise."""
_DROWNED = 0.3
"""Share of noise in the last layer's gradient from which it is asked whether there is anything else."""


def expected(solver: GaussNewton, state: State, rounding: Rows, prior: ImagePrior) -> tuple[Tensor, Tensor]:
    """The error of each image that the posterior expects, ``[P, B]``, and how many unknowns the update tells, ``[P]``.

    Draws from it count the noise of every element for itself. Rounding is not like that: what a layer rounds, all
    gradients below it share. So the answer's own rounding is followed to the images too. Coordinates not sought are as
    uncertain as the prior has them. Where fewer elements were kept than there are unknowns, the posterior is taken
    exactly, since conjugate gradients do not see what the update leaves open.
    """
    width = state.z.shape[2]
    root, size = solver.prior.root[:width], len(prior.root)
    rest = prior.variance[width:].sum() / size
    unknowns = state.z.shape[1] * width
    if int(solver.count.max()) < unknowns:
        left = torch.stack([_posterior(solver, state, place) for place in range(len(state.z))])
        return (left * solver.prior.variance[:width]).sum(2) / size + rest, unknowns - left.sum((1, 2))
    moves = list(solver.draws(state, solver.settings.draws, seed=1))
    drawn = torch.stack([(move @ root).square().mean(2) for move in moves]).mean(0)
    followed = (solver.estimate(state, rounding) @ root).square().mean(2) * state.misfit.clamp(max=1)[:, None]
    left = torch.stack([move.square().sum((1, 2)) for move in moves]).mean(0)
    return drawn.maximum(followed) + rest, (unknowns - left).clamp(min=0)


def _posterior(solver: GaussNewton, state: State, place: int) -> Tensor:
    """Variances ``[B, K]`` of one problem's coordinates, exactly, by as many equations as elements were kept."""
    width = state.z.shape[2]
    kept = {n: v[place].expand(solver.observed[n].shape[1]) for n, v in solver.root.items()}
    solver.exact.at(solver.images(state.z), solver.labels)
    samples = []
    for jacobian in solver.exact.jacobians(solver.prior.basis(0, width)):
        parts = []
        for name, block in jacobian.blocks.items():
            some = kept[name].nonzero()[:, 0]
            values = (block.values if isinstance(block, Dense) else dense(block))[place]
            parts.append(values[..., some] * kept[name][some])
        samples.append(torch.cat(parts, 2))
    rows = torch.cat(samples).flatten(0, 1)  # [B K, n]
    matrix = rows.mT @ rows
    matrix.diagonal().add_(1)
    told = torch.linalg.solve_triangular(torch.linalg.cholesky(matrix), rows.mT, upper=False)
    result: Tensor = (1 - told.square().sum(0)).clamp(min=0).view(-1, width)
    return result


def drowned(solver: GaussNewton, state: State, precision: Rows, told: Tensor, noises: list[Noise]) -> Tensor:
    """``[P]``, where what the answer explains of an update of noise is no more than noise gives to fit.

    Fitting as many unknowns as the update tells, `told`, takes about as many squares out of noise; a signal takes more.
    Where the residual is more than an unnoticed noise would leave, or less is noise, the question does not arise.
    """
    fitted, counts, share = [], [], []
    for name, residual in state.residual.items():
        weight = precision[name] if precision[name].dim() == 2 else precision[name][:, None]
        left = (residual / solver.root[name].clamp(min=1e-300)).square() * (weight > 0)
        fitted.append(((solver.observed[name].square() - left) * weight).sum(1))
        counts.append((weight > 0).expand_as(residual).sum(1))
        own = torch.stack([noise.std[name].square().nan_to_num(posinf=0).mean() for noise in noises]).to(weight.device)
        share.append(own / solver.observed[name].square().mean(1).clamp(min=1e-60))
    count = torch.stack(counts).sum(0).double()
    noisy = torch.stack(share).amax(0) > _DROWNED
    return noisy & (torch.stack(fitted).sum(0) < 3 * told + 6 * (2 * count).sqrt())


def calibrated(solver: GaussNewton, state: State, rounding: Rows, noises: list[Noise]) -> tuple[Rows, Tensor]:
    """Precisions with noise as large as the answer's rounding and residual say, and the misfit left, ``[P]``.

    A defense's noise that is granted stays. One that is not is scaled to the residual, tensor by tensor, less what the
    answer followed of it; small tensors take the others' share. Rounding is that of the answer's own update.
    """
    fixed = torch.tensor([noise.granted for noise in noises], device=state.misfit.device)
    found, squares, counts = {}, {}, {}
    for name, residual in state.residual.items():
        root = solver.root[name]
        rounded = rounding[name].square().mean(1).clamp(min=1e-60).sqrt()
        std = torch.where(root > 0, 1 / root, torch.inf)
        seen = fixed | (std.amin(1) > 10 * rounded)  # far above rounding: a defense's noise
        std = torch.where(seen[:, None] | ~std.isfinite(), std, rounded[:, None])
        found[name] = std
        squares[name] = (residual / root.clamp(min=1e-300) / std).square().nan_to_num(0, 0, 0).sum(1)
        counts[name] = std.isfinite().expand_as(residual).sum(1).double()
    count = torch.stack(list(counts.values())).sum(0)
    misfit = torch.stack(list(squares.values())).sum(0) / count
    unknowns = state.z.shape[1] * state.z.shape[2]
    large = [n for n, r in state.residual.items() if r.shape[1] >= _LARGE] or list(squares)
    result = {}
    for name, std in found.items():
        of = [name] if name in large else large
        free = torch.stack([counts[n] for n in of]).sum(0)
        free = (free * (1 - unknowns / count)).clamp(min=0.05 * free)
        share = torch.where(fixed, 1.0, (torch.stack([squares[n] for n in of]).sum(0) / free).clamp(min=0.05))
        precision = (std * share.sqrt()[:, None]) ** -2.0
        result[name] = precision[:, 0] if precision.shape[1] == 1 else precision
    return result, misfit


def reason_of(solver: GaussNewton, state: State, place: int, noise: Noise, misfit: float, ended: bool) -> StopReason:
    """Why a start ended; a residual that is left in the end, white and as large in every tensor, is a defense's noise.

    Args:
        ended: whether all coordinates were sought, and further steps would have gained nothing.
    """
    if not math.isfinite(misfit):
        return StopReason.DIVERGED
    if misfit <= EXPLAINED or (ended and not noise.granted and _uniform(solver, state, place)):
        return StopReason.CONVERGED
    return StopReason.STALLED if float(state.slow[place]) >= 4 else StopReason.BUDGET


def _uniform(solver: GaussNewton, state: State, place: int) -> bool:
    """Whether the residual in the update's own units is equally large in every large tensor, as added noise is."""
    sizes = []
    for name, value in state.residual.items():
        root = solver.root[name][place]
        if value.shape[1] >= _LARGE and bool((root > 0).all()):
            sizes.append(float((value[place] / root).square().mean().sqrt()))
    return len(sizes) > 1 and max(sizes) < 1.5 * min(sizes)


def noise_level(precision: Rows) -> Tensor:
    """``[P]``, the standard deviation of what separates the update from the answer's, over its elements that are known.

    Where that is a defense's noise it is the same in all of them; rounding is not.
    """
    return torch.stack([v.reshape(len(v), -1).amax(1) for v in precision.values()]).median(0).values.rsqrt()
