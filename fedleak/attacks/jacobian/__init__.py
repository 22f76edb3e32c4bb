"""How an update moves with the private images: derivatives of P updates by coordinates of their images."""

from fedleak.attacks.jacobian.base import Jacobian

__all__ = ["Jacobian"]
