"""Defenses: what a client does to its update before anything leaves it."""

from fedleak.defenses.base import Chain, Defense, Imitation, NoDefense
from fedleak.defenses.noise import Gaussian, Laplacian
from fedleak.defenses.pruning import Pruning

__all__ = ["Chain", "Defense", "Gaussian", "Imitation", "Laplacian", "NoDefense", "Pruning"]
