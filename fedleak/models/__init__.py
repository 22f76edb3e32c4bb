"""Models that the federation can share, their initialisations, and `build_model`."""

from fedleak.models.build import build_model
from fedleak.models.init import INITIALISATIONS, initialise
from fedleak.models.layers import Normalize, RepeatChannels
from fedleak.models.lenet import LeNet
from fedleak.models.mlp import MLP

__all__ = ["INITIALISATIONS", "MLP", "LeNet", "Normalize", "RepeatChannels", "build_model", "initialise"]
