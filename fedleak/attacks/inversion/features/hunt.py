"""One problem's images: a few starts at a time, through all convolutions first, then below those that can be undone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedleak.attacks.image_prior import ImagePrior, natural_prior
from fedleak.attacks.inversion.features.body import Body
from fedleak.attacks.inversion.features.search import Cooling, Search
from fedleak.attacks.inversion.features.undo import Lower, undo_convolution, undoable

GOAL = 5e-5
"""Relative misfit below which no further start is tried: what local minima leave is a hundred times as much."""
_EXACT = 1e-4
"""Of a lower body's error, up to which further starts begin below at once."""
_ROUGH = 0.35
"""Of the evaluations, before a convolution is undone: most winners are right early."""
_FLAT = 0.5
"""Power of the natural spectrum in a lower body, whose features tell all but the finest detail; auxiliary images lead
to fewer exact ones there."""
_FEATURES, _VARIATION = 0.1, 0.6
"""Weights in a lower body: its features are sharper, and its images need fewer edges to begin with."""


@dataclass
class Found:
    """The best so far.

    Attributes:
        images: ``[B, C, H, W]`` in [0, 1].
        misfit: relative, see `Search.misfit`, of the layers below what was undone exactly.
        starts: how many were tried.
        evaluations: all starts together.
        below: convolutions that were undone exactly.
        trace, snapshots: rows (evaluations, misfit) and (evaluations, images), the best after every stage.
    """

    images: Tensor
    misfit: float = math.inf
    starts: int = 0
    evaluations: int = 0
    below: int = 0
    trace: list[tuple[int, float]] = field(default_factory=list)
    snapshots: list[tuple[int, Tensor]] = field(default_factory=list)


class Hunt:
    """Searches through a body, and through what is left of it once its last convolutions are undone.

    Args:
        body: the layers below the exact features.
        features: ``[B, n]``.
        gradients: name -> tensor, observed, of all parameters of the body.
        prior: of images.
        cooling: of each search.
        late: whether time is over.
    """

    def __init__(
        self,
        body: Body,
        features: Tensor,
        gradients: Mapping[str, Tensor],
        prior: ImagePrior,
        cooling: Cooling,
        late: Callable[[], bool],
    ) -> None:
        self.body, self.gradients, self.cooling, self.late = body, gradients, cooling, late
        share = _ROUGH if undoable(body, len(features)) else 1.0
        rough = replace(cooling, evaluations=math.ceil(cooling.evaluations * share))
        self.whole = self.judge = Search(body, features, gradients, prior, rough)
        self.fine = natural_prior(body.image_shape).tempered(_FLAT).to(prior.mean.device)
        self.found = Found(torch.empty(0))

    def run(self, points: Iterable[Tensor], most: int) -> Found:
        """The best of several starts.

        Args:
            points: coordinates ``[S, B, D]``, the starts of one attempt after the other.
            most: evaluations after which no further attempt is made.
        """
        exact: Search | None = None
        for z in points:
            before = self.found.evaluations
            self.found.starts += len(z)
            if exact is None and not self.found.evaluations:
                exact = self._exact(self._below(self.whole.images(0 * z[:1])))
            if exact is None:
                z = self._searched(self.whole, z)
                lower = self._below(self.whole.images(z))
                exact = self._exact(lower)
                if exact is None and lower is not None:
                    self._searched(self._search(lower), self._fine(z))
            if exact is not None:
                self._searched(exact, self._fine(z))
            self.whole.cooling = self.cooling  # where winners were wrong, further starts look longer
            each = len(z) * self.cooling.stages * self.cooling.evaluations
            cost = self.found.evaluations - before if exact is None else each
            if self.found.misfit <= GOAL or self.late() or self.found.evaluations + cost > most:
                break
        return self.found

    def _below(self, starts: Tensor) -> Lower | None:
        """What is left after as many convolutions as some start's images ``[S, B, C, H, W]`` allow to undo."""
        best: Lower | None = None
        for images in starts:
            body, error = self.body, 0.0
            while (lower := undo_convolution(body, self.gradients, images)) is not None:
                body, error = lower.body, max(error, lower.error)
                lower = replace(lower, error=error)
                if best is None or (len(body.layers), error) < (len(best.body.layers), best.error):
                    best = lower
        return best

    def _exact(self, lower: Lower | None) -> Search | None:
        if lower is None or lower.error > _EXACT:
            return None
        self.found.below = sum(bool(v.parameters) for v in self.body.layers[len(lower.body.layers) :])
        self.judge = self._search(lower)
        if len(self.found.images):
            self.found.misfit = float(self._misfit(self.found.images[None]))
        return self.judge

    def _search(self, lower: Lower) -> Search:
        names = [name for layer in lower.body.layers for name in layer.parameters]
        gradients = {name: self.gradients[name] for name in names}
        cooling = replace(self.cooling, features=_FEATURES, variation=_VARIATION)
        return Search(lower.body, lower.features, gradients, self.fine, cooling, lower.known)

    def _fine(self, z: Tensor) -> Tensor:
        """The same images in the coordinates of searches below."""
        return self.fine.coordinates(self.whole.images(z)).to(z)

    def _searched(self, search: Search, z: Tensor) -> Tensor:
        """What the starts at `z` end with; the best image is kept."""
        spent = self.found.evaluations - search.evaluations

        def on_stage(z: Tensor) -> None:
            self.found.evaluations = spent + search.evaluations
            self._keep(search.images(z))

        return search.run(z, self.late, on_stage)

    def _keep(self, images: Tensor) -> None:
        misfit, found = self._misfit(images), self.found
        best = int(misfit.argmin())
        if float(misfit[best]) < found.misfit or not len(found.images):
            found.images, found.misfit = images[best], float(misfit[best])
        found.trace.append((found.evaluations, found.misfit))
        found.snapshots.append((found.evaluations, found.images.clamp(0, 1).half().cpu()))

    @torch.no_grad()
    def _misfit(self, images: Tensor) -> Tensor:
        return self.judge.misfit(images, 0.0).nan_to_num(torch.inf)
