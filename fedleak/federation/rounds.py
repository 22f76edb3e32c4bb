"""Which rounds of a long federation something happens in."""

from __future__ import annotations


def is_due(server_round: int, every: int) -> bool:
    """Whether `server_round` is among the rounds 1, 1 + every, 1 + 2 · every, …"""
    return (server_round - 1) % every == 0
