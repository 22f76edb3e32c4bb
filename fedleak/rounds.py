"""Which rounds of a long federation something happens in, and which of the captured updates are attacked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def is_due(server_round: int, every: int) -> bool:
    """Whether `server_round` is among the rounds 1, 1 + every, 1 + 2 · every, …"""
    return (server_round - 1) % every == 0


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
