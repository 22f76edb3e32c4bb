"""Defenses: transforms of an update that a client applies before anything leaves it."""

from fedleak.defenses.base import Chain, Defense, NoDefense
from fedleak.defenses.noise import Gaussian, Laplacian
from fedleak.defenses.pruning import Pruning

__all__ = ["Chain", "Defense", "Gaussian", "Laplacian", "NoDefense", "Pruning"]
