"""Maximum a posteriori: the images that an update and a prior together make most likely, and how sure they are."""

from fedleak.attacks.inversion.map.attack import MAP

__all__ = ["MAP"]
