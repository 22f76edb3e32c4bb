"""Defenses: what a client does to its update before anything leaves it."""

from fedleak.defenses.base import Chain, ClientView, Defense, Imitation, NoDefense
from fedleak.defenses.clipping import Clipping
from fedleak.defenses.masking import Masking
from fedleak.defenses.mixing import MixUp
from fedleak.defenses.noise import Gaussian, Laplacian
from fedleak.defenses.outpost import Outpost
from fedleak.defenses.precision import HalfPrecision
from fedleak.defenses.privacy import DPSGD, LocalDP
from fedleak.defenses.pruning import Pruning
from fedleak.defenses.quantisation import Sign, Stochastic, Uniform
from fedleak.defenses.representation import Soteria
from fedleak.defenses.svd import TruncatedSVD

__all__ = [
    "DPSGD",
    "Chain",
    "ClientView",
    "Clipping",
    "Defense",
    "Gaussian",
    "HalfPrecision",
    "Imitation",
    "Laplacian",
    "LocalDP",
    "Masking",
    "MixUp",
    "NoDefense",
    "Outpost",
    "Pruning",
    "Sign",
    "Soteria",
    "Stochastic",
    "TruncatedSVD",
    "Uniform",
]
