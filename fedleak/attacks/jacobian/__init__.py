"""How an update moves with the private images: derivatives of P updates by coordinates of their images."""

import warnings

from fedleak.attacks.jacobian.base import Jacobian

# torch's own forward mode calls what torch deprecates, once a process.
warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated", category=FutureWarning)

__all__ = ["Jacobian"]
