"""Images from a gradient in closed form, where the model is a chain that can be undone layer by layer."""

from fedleak.attacks.inversion.peeling.peeling import Peeling, closed_form

__all__ = ["Peeling", "closed_form"]
