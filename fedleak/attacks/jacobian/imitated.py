"""Updates as a defense makes them: another update model with each problem's imitation on top of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from fedleak.attacks.chain.base import Dense, Rows
from fedleak.attacks.jacobian.base import Jacobian, UpdateModel, dense
from fedleak.attacks.problem import Target
from fedleak.training import Tensors

_NUMBERS = 2**25
"""Numbers in the tangents that go through an imitation at once."""


class ImitatedModel:
    """P updates through what each client's defense makes of them; see `UpdateModel`.

    Args:
        inner: the updates without a defense.
        targets: one a problem, with its `imitate` (None leaves its update alone).
    """

    def __init__(self, inner: UpdateModel, targets: Sequence[Target]) -> None:
        self.inner = inner
        self.shapes = [{name: value.shape for name, value in target.update.items()} for target in targets]
        self.imitations = [target.imitate for target in targets]

    def at(self, images: Tensor, labels: Tensor) -> None:
        """Stand at images ``[P, B, C, H, W]`` with label distributions ``[P, B, classes]``."""
        self.inner.at(images, labels)
        self.batch = self.inner.batch
        self._here: Rows | None = None

    def gradients(self) -> Rows:
        """The defended updates, name -> ``[P, n]``."""
        whole = self._gradients()
        return _stack([self._function(place)(_row(whole, place)) for place in range(len(self.imitations))])

    def push(self, directions: Tensor) -> Rows:
        """Derivatives of the defended updates, name -> ``[P, n]``, along directions ``[P, B, C, H, W]``."""
        whole, moved = self._gradients(), self.inner.push(directions)
        found = []
        for place in range(len(self.imitations)):
            found.append(jvp(self._function(place), (_row(whole, place),), (_row(moved, place),))[1])
        return _stack(found)

    def pull(self, values: Rows) -> Tensor:
        """The adjoint of `push`: ``[P, B, C, H, W]`` of name -> ``[P, n]``."""
        whole = self._gradients()
        found = []
        for place in range(len(self.imitations)):
            here = _row(whole, place)
            back = vjp(self._function(place), here)[1]
            found.append(back({n: v.to(here[n]) for n, v in _row(values, place).items()})[0])
        return self.inner.pull(_stack(found))

    def jacobian(self, basis: Tensor) -> Jacobian:
        """Derivatives by coordinates in `basis` ``[K, C, H, W]``, the same for every sample; then call `at` anew."""
        return Jacobian.join(list(self.jacobians(basis)))

    def jacobians(self, basis: Tensor) -> Iterator[Jacobian]:
        """The same, some samples of every problem at a time, so that memory is bounded."""
        whole = self._gradients()
        numbers = sum(value.shape[1] for value in whole.values())
        for part in self.inner.jacobians(basis):
            columns = {name: dense(block) for name, block in part.blocks.items()}  # [P, B, K, n]
            samples = next(iter(columns.values())).shape[1]
            found = []
            for place in range(len(self.imitations)):
                function, here = self._function(place), _row(whole, place)

                def through(column: Rows, function: Callable[[Rows], Rows] = function, here: Rows = here) -> Rows:
                    moved: Rows = jvp(function, (here,), (column,))[1]
                    return moved

                flat = {name: value[place].flatten(0, 1).to(here[name]) for name, value in columns.items()}
                found.append(vmap(through, chunk_size=max(1, _NUMBERS // numbers))(flat))
            yield Jacobian({n: Dense(v.unflatten(1, (samples, -1))) for n, v in _stack(found).items()})

    def _gradients(self) -> Rows:
        if self._here is None:
            self._here = self.inner.gradients()
        return self._here

    def _function(self, place: int) -> Callable[[Rows], Rows]:
        """One problem's imitation, name -> ``[n]`` to name -> ``[n]``."""
        imitate, shapes = self.imitations[place], self.shapes[place]
        if imitate is None:
            return dict

        def function(flat: Rows) -> Rows:
            shaped: Tensors = {name: value.view(shapes[name]) for name, value in flat.items()}
            made = imitate(shaped)
            return {name: made[name].flatten() for name in flat}

        return function


def _row(rows: Rows, place: int) -> Rows:
    return {name: value[place] for name, value in rows.items()}


def _stack(rows: Sequence[Rows]) -> Rows:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
