"""``fedleak frontier``: what each defense costs, and what leaks through it all the same."""

from fedleak.studies.frontier.study import Frontier

__all__ = ["Frontier"]
