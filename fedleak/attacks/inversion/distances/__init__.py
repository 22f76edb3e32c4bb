"""Distances between the updates of sought images and the observed ones, many problems at a time."""

from fedleak.attacks.inversion.distances.base import Comparison, Distance, Rows
from fedleak.attacks.inversion.distances.chain import ChainDistance
from fedleak.attacks.inversion.distances.general import GeneralDistance
from fedleak.attacks.inversion.distances.loop import LoopDistance

__all__ = ["ChainDistance", "Comparison", "Distance", "GeneralDistance", "LoopDistance", "Rows"]
