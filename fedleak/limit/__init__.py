"""How much an update can leak at most, whoever attacks it: the limit beside what was reached."""

from fedleak.limit.bound import Limit, limit

__all__ = ["Limit", "limit"]
