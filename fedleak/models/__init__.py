"""Models that the federation can share, their initialisations, and `build_model`.

torchvision's, with the same switches, are in `fedleak.models.vision`, which is imported where one is built.
"""

from fedleak.models.build import build_model
from fedleak.models.cnn import CNN, ConvNet
from fedleak.models.init import INITIALISATIONS, initialise
from fedleak.models.layers import Logits, Normalize, RepeatChannels
from fedleak.models.lenet import LeNet
from fedleak.models.mlp import MLP
from fedleak.models.resnet import ResNet20
from fedleak.models.vit import ViT

__all__ = [
    "CNN",
    "INITIALISATIONS",
    "MLP",
    "ConvNet",
    "LeNet",
    "Logits",
    "Normalize",
    "RepeatChannels",
    "ResNet20",
    "ViT",
    "build_model",
    "initialise",
]
