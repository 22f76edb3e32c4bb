"""One sample's image by its exact features first: for networks with ReLUs and pooling."""

from fedleak.attacks.inversion.features.attack import FeaturesFirst
from fedleak.attacks.inversion.features.unwind import Unwound, unwind

__all__ = ["FeaturesFirst", "Unwound", "unwind"]
