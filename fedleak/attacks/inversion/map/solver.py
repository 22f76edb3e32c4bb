"""Regularised Gauss-Newton on P problems at once: images as coordinates of a Gaussian prior, the noise falling.

    minimise over z   ½ ‖R^-½ (g(x(z)) − u)‖² / s + ½ ‖z‖²,     x = mean + z root,    s from the first misfit down to 1.

Each step solves (J_zᵀ J_z / s + 1 + λ) dz = −(z + J_zᵀ r / s) by conjugate gradients. The products with J are exact, in
float64 and matrix-free; what makes them few is a preconditioner in float32: the normal matrix itself where memory holds
it, else each sample's own block together with the leading coordinates of all samples. It is made anew when conjugate
gradients need too many steps with the last one. Leading coordinates are sought first, since what an image holds beyond
them is small: coarse to fine. The iteratively regularised form is Bakushinskii's (1992).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedleak.attacks.chain.base import Rows
from fedleak.attacks.image_prior import ImagePrior
from fedleak.attacks.inversion.map.preconditioner import Preconditioner
from fedleak.attacks.jacobian.base import UpdateModel
from fedleak.seeding import plain_generator

_LINEAR = 0.9
"""From this share of the foretold fall on, an update is nearly linear."""
_DEAR = 400_000
"""Unknowns, squared, whose preconditioner costs as much as a few steps of conjugate gradients."""


@dataclass(frozen=True)
class Settings:
    """How the solver goes about it.

    Attributes:
        stages: leading coordinates of each image sought one after the other; all of them in the end.
        coarse_steps: steps of each stage but the last, at most; it ends where its coordinates have told what they can.
        max_steps: Gauss-Newton steps of the last stage, at most.
        shrink: s is at most this share of the misfit.
        linear: s falls to this share of itself where the update did what a linear model foretold.
        ahead: s is at least this share of the misfit: far ahead of it there is nothing but dead ends.
        forcing: conjugate gradients stop at this relative residual.
        patience: steps of conjugate gradients with an old preconditioner, and with a new one. An old one passes steps
            for good that hardly move what the update tells little of: a new one is worth several such steps. Where
            there are more than 3,000 unknowns and it costs more, an old one serves longer.
        most_patience: with an old one, and with one in parts, with which more steps are needed in any case.
        last_patience: with an old one at the noise, where a new one serves the posterior too.
        draws: from the posterior, of which the expected errors are made.
    """

    stages: Sequence[int] = (100, 300)
    coarse_steps: int = 8
    max_steps: int = 60
    shrink: float = 0.3
    linear: float = 0.01
    ahead: float = 3e-3
    forcing: float = 0.03
    patience: tuple[int, int] = (20, 150)
    most_patience: int = 250
    last_patience: int = 40
    draws: int = 6


@dataclass
class State:
    """Where P problems stand.

    Attributes:
        z: ``[P, B, K]`` float64.
        s: ``[P]``, the factor on the noise's covariance.
        damping: ``[P]``, λ.
        residual: name -> ``[P, n]``, g − u over the noise's standard deviation.
        misfit: ``[P]``, mean square of the residual; about 1 where the images explain the update.
        gain: ``[P]``, relative fall of the objective in the last step; 0 where it was refused.
        trust: ``[P]``, that fall over what the linear model foretold; 1 where the update is all but linear.
        slow: ``[P]``, how many steps in a row gained little.
        evaluations: ``[P]``, evaluations of the update and products with its derivative.
    """

    z: Tensor
    s: Tensor
    damping: Tensor
    residual: Rows
    misfit: Tensor
    gain: Tensor
    trust: Tensor
    slow: Tensor
    evaluations: Tensor


class GaussNewton:
    """Solves P problems of equal size.

    Args:
        exact: the update's model in float64.
        rough: the same in float32, for preconditioners.
        observed: name -> ``[P, n]`` float64.
        precision: name -> ``[P]`` or ``[P, n]`` float64, the noise's inverse variance; zero where nothing is known.
        labels: ``[P, B, classes]`` float64.
        prior: of one image.
        settings: see `Settings`.
    """

    def __init__(
        self,
        exact: UpdateModel,
        rough: UpdateModel,
        observed: Rows,
        precision: Rows,
        labels: Tensor,
        prior: ImagePrior,
        settings: Settings,
    ) -> None:
        self.exact, self.rough = exact, rough
        self.observed, self.labels, self.prior, self.settings = observed, labels, prior, settings
        self.batch = labels.shape[1]
        self.preconditioner: Preconditioner | None = None
        self._width = 0
        self.weigh(precision)

    def weigh(self, precision: Rows) -> None:
        """Take another noise model."""
        self.precision = precision
        self.root = {n: (v if v.dim() == 2 else v[:, None]).sqrt() for n, v in precision.items()}
        self.count = torch.stack([(self.root[n] > 0).expand_as(self.observed[n]).sum(1) for n in self.observed]).sum(0)

    def prepare(self, width: int) -> None:
        """Seek the first `width` coordinates of each image, with a new preconditioner."""
        if self._width == width and self.preconditioner is not None:
            return
        self._width = width
        self.preconditioner = Preconditioner(self.precision, self.prior.basis(0, width))

    def believe(self, prior: ImagePrior) -> None:
        """Take another prior, of the same eigenvectors."""
        if self.preconditioner is not None and self.preconditioner.ready:
            wider = (prior.variance / self.prior.variance)[: self._width].sqrt()
            self.preconditioner.rescale(wider, prior.basis(0, self._width))
        else:
            self.preconditioner = None
        self.prior = prior

    def start(self, z: Tensor) -> State:
        """The state at coordinates z ``[P, B, K]``."""
        residual = self._residual(z)
        misfit = self._misfit(residual)
        zero = torch.zeros_like(misfit)
        return State(z, misfit.clamp(min=1.0), zero, residual, misfit, zero + 1, zero, zero, zero + 1)

    def run(self, state: State, *, on_step: Callable[[State], bool] | None = None, last: int | None = None) -> State:
        """Coarse to fine, then down to the noise.

        Args:
            state: where to start; its coordinates say at which stage.
            on_step: called after each step; True ends the run.
            last: the stage to end with; None for all coordinates.
        """
        size = self.prior.root.shape[0]
        stages = [k for k in self.settings.stages if state.z.shape[2] <= k < size]
        for width in [*stages, size]:
            if width > (last or size):
                break
            state.z = _widen(state.z, width)
            self.prepare(width)
            for _ in range(self.settings.coarse_steps if width < size else self.settings.max_steps):
                least = self._unsought(state, width).clamp(min=1.0) if width < size else torch.ones_like(state.s)
                self._step(state, least)
                state.slow = torch.where(state.gain < 0.05, state.slow + 1, 0)
                if on_step is not None and on_step(state):
                    return state
                told = (state.misfit < 3 * least) | (state.gain < 0.1)
                if bool((self.settled(state) if width == size else told).all()):
                    break
        return state

    def settled(self, state: State) -> Tensor:
        """``[P]``, where further steps would gain nothing: at the noise, in a dead end, or out of numbers."""
        arrived = (state.s <= 1) & (state.gain < torch.where(state.trust > _LINEAR, 0.1, 0.02))
        return arrived | (state.slow >= 4) | ~state.misfit.isfinite()

    def draws(self, state: State, count: int, seed: int) -> Iterator[Tensor]:
        """Deviations ``[P, B, K]`` from the answer, drawn from the linearised posterior at it."""
        generator = plain_generator(seed)
        at = replace(state, s=torch.ones_like(state.s), damping=torch.zeros_like(state.s))
        self._width = state.z.shape[2]
        for _ in range(count):
            noise = {n: torch.randn(r.shape, generator=generator, dtype=r.dtype) for n, r in state.residual.items()}
            own = torch.randn(state.z.shape, generator=generator, dtype=state.z.dtype).to(state.z)
            self.exact.at(self.images(state.z), self.labels)
            yield self._solve(at, self.pull({n: v.to(own) for n, v in noise.items()}) + own)

    def estimate(self, state: State, error: Rows) -> Tensor:
        """How far an error of the update, name -> ``[P, n]``, moves the answer, ``[P, B, K]``, to first order."""
        at = replace(state, s=torch.ones_like(state.s), damping=torch.zeros_like(state.s))
        self._width = state.z.shape[2]
        self.exact.at(self.images(state.z), self.labels)
        return self._solve(at, self.pull({name: value * self.root[name] for name, value in error.items()}))

    def rounding(self, state: State) -> Rows:
        """What float32 makes of the update at the answer, less the update: name -> ``[P, n]``."""
        images = self.images(state.z).float()
        found = []
        for model in (self.rough, self.exact):
            model.at(images.to(state.z), self.labels)
            found.append(model.gradients())
        return {name: value.double() - found[1][name] for name, value in found[0].items()}

    def images(self, z: Tensor) -> Tensor:
        """``[P, B, C, H, W]``."""
        return self.prior.images(z)

    def _residual(self, z: Tensor) -> Rows:
        self.exact.at(self.images(z), self.labels)
        found = self.exact.gradients()
        return {name: (found[name] - self.observed[name]) * self.root[name] for name in self.observed}

    def _misfit(self, residual: Rows) -> Tensor:
        return torch.stack([r.square().sum(1) for r in residual.values()]).sum(0) / self.count

    def objective(self, misfit: Tensor, z: Tensor, s: Tensor) -> Tensor:
        """What a step must lower, ``[P]``."""
        return 0.5 * misfit * self.count / s + 0.5 * z.square().sum((1, 2))

    def pull(self, values: Rows) -> Tensor:
        """J_zᵀ of name -> ``[P, n]``, in the coordinates in use, ``[P, B, K]``."""
        images = self.exact.pull({name: value * self.root[name] for name, value in values.items()})
        return images.flatten(2) @ self.prior.root[: self._width].T

    def push(self, z: Tensor) -> Rows:
        """J_z of ``[P, B, K]``: name -> ``[P, n]``."""
        images = (z @ self.prior.root[: z.shape[2]]).unflatten(2, self.prior.image_shape)
        return {name: value * self.root[name] for name, value in self.exact.push(images).items()}

    def normal(self, z: Tensor, s: Tensor, damping: Tensor | float = 0.0) -> Tensor:
        """(J_zᵀ J_z / s + 1 + λ) z."""
        lift = 1 + damping if isinstance(damping, float) else 1 + damping[:, None, None]
        return self.pull(self.push(z)) / s[:, None, None] + lift * z

    def _unsought(self, state: State, width: int) -> Tensor:
        """``[P]``, the misfit that coordinates beyond `width` cause: noise, until they are sought too."""
        rest = self.prior.root[width:]
        generator = plain_generator(width)
        drawn = torch.randn(self.batch, len(rest), generator=generator, dtype=rest.dtype).to(rest.device)
        self.exact.at(self.images(state.z), self.labels)
        images = (drawn @ rest).unflatten(1, self.prior.image_shape).expand(len(state.z), -1, -1, -1, -1)
        moved = self.exact.push(images)
        state.evaluations += 1
        return self._misfit({name: value * self.root[name] for name, value in moved.items()})

    def _step(self, state: State, least: Tensor) -> None:
        """One Gauss-Newton step of every problem; where it does not lower the objective, the damping rises instead."""
        self._width = state.z.shape[2]
        # Where a whole step gained little, or did what a linear model foretold, this level has no more to give: on to a
        # lower one.
        over = ((state.gain < 0.2) | (state.trust > _LINEAR)) & (state.damping == 0)
        fall = torch.where(state.trust > _LINEAR, self.settings.linear, 0.1)
        lower = torch.minimum(torch.where(over, fall * state.s, state.s), self.settings.shrink * state.misfit)
        lower = torch.minimum(state.s, lower.maximum(self.settings.ahead * state.misfit))
        state.s = torch.maximum(least, lower)
        before = self.objective(state.misfit, state.z, state.s)
        self.exact.at(self.images(state.z), self.labels)
        right = -(state.z + self.pull(state.residual) / state.s[:, None, None])
        pending = torch.ones_like(before, dtype=torch.bool)
        state.gain = torch.zeros_like(before)
        for attempt in range(4):
            if attempt:
                self.exact.at(self.images(state.z), self.labels)
            move = self._solve(state, right)
            z, residual, misfit, after = self._search(state, move, before)
            better = pending & (after < before)
            state.z = torch.where(better[:, None, None], z, state.z)
            state.residual = {n: torch.where(better[:, None], residual[n], r) for n, r in state.residual.items()}
            state.misfit = torch.where(better, misfit, state.misfit)
            state.gain = torch.where(better, 1 - after / before, state.gain)
            foretold = 0.5 * (right * move).sum((1, 2)) / before
            state.trust = torch.where(better, state.gain / foretold, 0.0)
            easier = torch.where(state.damping > 1e-3, state.damping / 5, 0.0)
            harder = (10 * state.damping).clamp(min=0.1)
            state.damping = torch.where(better, easier, torch.where(pending, harder, state.damping))
            pending = pending & ~better
            if not bool(pending.any()):
                break

    def _search(self, state: State, move: Tensor, before: Tensor) -> tuple[Tensor, Rows, Tensor, Tensor]:
        """The best of the whole step, half of it, a quarter …, as long as shorter ones are better."""
        length = torch.ones_like(before)
        z, residual, misfit, best = state.z, state.residual, state.misfit, torch.full_like(before, torch.inf)
        searching = torch.ones_like(before, dtype=torch.bool)
        for _ in range(6):
            tried = state.z + length[:, None, None] * move
            found = self._residual(tried)
            level = self._misfit(found)
            after = self.objective(level, tried, state.s)
            state.evaluations += searching
            better = searching & (after < best)
            z = torch.where(better[:, None, None], tried, z)
            residual = {n: torch.where(better[:, None], found[n], r) for n, r in residual.items()}
            misfit, best = torch.where(better, level, misfit), torch.where(better, after, best)
            searching = searching & (best > 0.5 * before) & (better | (best >= before))
            if not bool(searching.any()):
                break
            length = torch.where(searching, length / 2, length)
        return z, residual, misfit, best

    def _solve(self, state: State, right: Tensor) -> Tensor:
        """Conjugate gradients; with an old preconditioner first, with a new one where that takes too long."""
        assert self.preconditioner is not None
        move = torch.zeros_like(right)
        for renew in (False, True):
            if renew:
                self.rough.at(self.images(state.z), self.labels)
                self.preconditioner.renew(self.rough)
            elif not self.preconditioner.ready:
                continue
            self.preconditioner.factor(state.s, state.damping)
            most = self.settings.patience[renew]
            if not renew:
                unknowns = right[0].numel()
                dear = self.settings.most_patience if self.preconditioner.blocks is not None else unknowns**2 // _DEAR
                most = max(most, min(dear, self.settings.most_patience))
            if not renew and bool((state.trust > _LINEAR).any()) and bool((state.s <= 1).all()):
                most = self.settings.last_patience
            move, done = self._conjugate_gradients(state, right, move, most)
            if bool(done.all()):
                break
        return move

    def _conjugate_gradients(self, state: State, right: Tensor, x: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """x, improved, and where it is good enough, ``[P]``."""
        assert self.preconditioner is not None

        def inner(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).sum((1, 2))

        rest = right - self.normal(x, state.s, state.damping) if bool(x.any()) else right
        solved = self.preconditioner.solve(rest)
        direction, size = solved, inner(rest, solved)
        goal = self.settings.forcing**2 * inner(right, self.preconditioner.solve(right))
        done = size <= goal
        for _ in range(most):
            if bool(done.all()):
                break
            product = self.normal(direction, state.s, state.damping)
            length = torch.where(done, 0.0, size / inner(direction, product).clamp(min=1e-300))[:, None, None]
            x, rest = x + length * direction, rest - length * product
            solved = self.preconditioner.solve(rest)
            new = inner(rest, solved)
            direction = solved + (new / size)[:, None, None] * direction
            size = torch.where(done, size, new)
            done = done | (size <= goal)
            state.evaluations += 1
        return x, done


def _widen(z: Tensor, width: int) -> Tensor:
    """Zeros for coordinates not sought before."""
    return torch.nn.functional.pad(z, (0, max(0, width - z.shape[2])))
