"""Which rounds of a long federation something happens in, and which of the captured updates are attacked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def is_due(server_round: int, every: int) -> bool:
    """Whether `server_round` is among the rounds 1, 1 + every, 1 + 2 · every, …"""
    return (server_round - 1) % every == 0


@dataclass(frozen=True)
class Keep:
    """The `capture` group: which updates the server keeps, and what is private behind them.

    Attributes:
        clients: ``all``, those numbered below a whole number, or a list of numbers.
        rounds: ``all``, the first so many, or a list.
        dtype: of updates on disk: ``float16``, ``bfloat16`` or ``float32``; None for as they were sent.
        every: rounds 1, 1 + every, … of those.
    """

    clients: int | tuple[int, ...] | str = "all"
    rounds: int | tuple[int, ...] | str = "all"
    dtype: str | None = None
    every: int = 1

    def of_round(self, server_round: int) -> bool:
        """Whether anything of a round is kept."""
        return is_due(server_round, self.every) and self.clients != 0 and _among(server_round, self.rounds, 1)

    def __call__(self, server_round: int, client: int) -> bool:
        """Whether the update of one client in one round is kept."""
        return self.of_round(server_round) and _among(client, self.clients, 0)


EVERYTHING = Keep()
NOTHING = Keep(clients=0)
"""No eavesdropper at all: ``capture=none``."""


def _among(number: int, chosen: int | tuple[int, ...] | str, first: int) -> bool:
    if isinstance(chosen, str):
        return True
    return number < first + chosen if isinstance(chosen, int) else number in chosen


def choose_victims(rows: Sequence[Mapping[str, Any]], every: int | str, clients: int | str) -> list[Mapping[str, Any]]:
    """Rounds 1, 1 + every, …, and of each the first `clients` by number (all of them for ``all``).

    ``auto`` attacks every captured round of a short federation, and about ten of a long one.

    Args:
        rows: the captures' index, by round and client.
    """
    captured = sorted({row["round"] for row in rows})
    if every == "auto":
        chosen = set(captured[:: max(1, math.ceil(len(captured) / 10))])
    else:
        chosen = {number for number in captured if is_due(number, int(every))}
    victims: list[Mapping[str, Any]] = []
    taken: dict[int, int] = {}
    for row in rows:
        number = row["round"]
        if number in chosen and (clients == "all" or taken.get(number, 0) < int(clients)):
            taken[number] = taken.get(number, 0) + 1
            victims.append(row)
    return victims
