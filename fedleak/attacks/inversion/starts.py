"""Images that a search begins with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from fedleak.attacks.problem import Problem
from fedleak.errors import UsageError
from fedleak.seeding import mixed_generator


class Start(ABC):
    """Where starts begin. Subclass it in a file of your own and name it by ``_target_``."""

    @abstractmethod
    def images(self, problem: Problem, restart: int, noise: Tensor, generator: torch.Generator) -> Tensor:
        """Images ``[B, C, H, W]`` float64, decided by the arguments alone.

        Args:
            problem: what is to be solved.
            restart: 0 for a problem's first start, then 1, 2, …
            noise: ``[B, C, H, W]`` float64, standard normal numbers of this start's own.
            generator: for more of them.
        """


class Normal(Start):
    """Standard normal pixels, as in DLG and iDLG."""

    def images(self, problem: Problem, restart: int, noise: Tensor, generator: torch.Generator) -> Tensor:
        """The noise itself."""
        return noise


class Uniform(Start):
    """Pixels uniform on [0, 1]."""

    def images(self, problem: Problem, restart: int, noise: Tensor, generator: torch.Generator) -> Tensor:
        """Fresh numbers."""
        return torch.rand(noise.shape, generator=generator, dtype=noise.dtype)


class Grey(Start):
    """0.5, plus a little noise from the second start on and where there is more than one image."""

    def images(self, problem: Problem, restart: int, noise: Tensor, generator: torch.Generator) -> Tensor:
        """Grey without noise, or with a tenth of it."""
        return torch.full_like(noise, 0.5) + (0.0 if restart == 0 and len(noise) == 1 else 0.1) * noise


def start_of(start: str | Start) -> Start:
    """The start of a name, ``normal``, ``uniform`` or ``grey``; one that is made already stays.

    Raises:
        UsageError: there is none of that name.
    """
    named: dict[str, Callable[[], Start]] = {"normal": Normal, "uniform": Uniform, "grey": Grey}
    if isinstance(start, Start):
        return start
    if start not in named:
        mend = "or name a subclass of fedleak.attacks.inversion.Start by _target_"
        raise UsageError(f"inversion.start={start}: choose one of {', '.join(named)}, {mend}")
    return named[start]()


def first_point(
    start: Start, problem: Problem, restart: int, image_shape: tuple[int, int, int], classes: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Images ``[B, C, H, W]``, and logits ``[B, classes]`` for where labels are sought too; both float64.

    Drawn from (seed, round, client, sample, restart) alone. The first restart takes the problem's own images.
    """
    generator = mixed_generator(seed, *problem.key, restart)
    noise = torch.randn((problem.samples, *image_shape), generator=generator, dtype=torch.float64)
    logits = torch.randn((problem.samples, classes), generator=generator, dtype=torch.float64)
    if restart == 0 and problem.start is not None:
        return problem.start.double().cpu(), logits
    return start.images(problem, restart, noise, generator), logits
