"""Which start of which problem runs next, and when a problem is finished."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from fedleak.attacks.results import StopReason


@dataclass(eq=False, kw_only=True)
class Standing:
    """How one start of a problem stands.

    Attributes:
        restart: which of the problem's random draws it begins with, from 0.
        candidate: which of the problem's label multisets it takes, from 0.
        evaluations: so far.
        objective: the lowest so far, priors included; infinite as long as it waits.
        reason: why it ended; None while it waits or runs.
    """

    restart: int
    candidate: int
    evaluations: int = 0
    objective: float = float("inf")
    reason: StopReason | None = None


class Schedule(ABC):
    """Decides about the starts of each problem. Subclass it in a file of your own and name it by ``_target_``.

    Which starts run at the same time, memory decides: compare starts at equal `Standing.evaluations` for results that
    depend on nothing else. A problem is finished when none of its starts waits or runs and no more is launched.
    """

    every: int | None = None
    """Evaluations between two looks at starts that run; None looks only where one ended."""

    @abstractmethod
    def launch(self, standings: Sequence[Standing], *, restarts: int, candidates: int) -> Sequence[tuple[int, int]]:
        """(restart, candidate) of the starts that are to run now too, asked at first and whenever one ended.

        Args:
            standings: all of the problem's starts so far, in the order in which they were launched.
            restarts, candidates: how many of each there are.
        """

    def drop(self, standings: Sequence[Standing]) -> Sequence[Standing]:
        """Those that wait or run and are to end now, asked every `every` evaluations and whenever one ended.

        They end as ``stalled``; the problem's best images may still be theirs.
        """
        return ()


class InTurn(Schedule):
    """One after the other until one converges: every candidate once, then every candidate again."""

    def launch(self, standings: Sequence[Standing], *, restarts: int, candidates: int) -> Sequence[tuple[int, int]]:
        """The next, unless the last has converged or all were tried."""
        restart, candidate = divmod(len(standings), candidates)
        over = restart >= restarts or any(s.reason in (None, StopReason.CONVERGED) for s in standings)
        return () if over else ((restart, candidate),)
