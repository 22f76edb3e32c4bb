"""Dataset condensation by gradient matching (Zhao, Mopuri and Bilen 2021): a few made images in place of a data set."""

from fedleak.condensation.condense import Progress, Recipe, condense
from fedleak.condensation.evaluate import Trainer
from fedleak.condensation.network import ConvNet
from fedleak.condensation.store import FILE, Condensed, load_condensed, save_condensed

__all__ = [
    "FILE",
    "Condensed",
    "ConvNet",
    "Progress",
    "Recipe",
    "Trainer",
    "condense",
    "load_condensed",
    "save_condensed",
]
