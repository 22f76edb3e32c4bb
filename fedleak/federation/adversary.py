"""A malicious server: what it does to the model that clients train, beyond looking at what they send back."""

from __future__ import annotations

from torch import nn

from fedleak.training import Tensors


class Adversary:
    """Two hooks, of which each by default changes nothing: an honest-but-curious server. Subclass it in a file of your
    own and name it by ``_target_``.

    Whatever it does, the clients train what they get, and the eavesdropper captures what each was sent.
    """

    def prepare(self, model: nn.Module) -> nn.Module:
        """The architecture and weights that the federation starts with, the same for server, clients and attacker.

        Args:
            model: the freshly initialised shared model, which may be changed in place.
        """
        return model

    def send(self, round: int, client: int, state: Tensors) -> Tensors:
        """What one client is sent in one round; the server's own model stays as it is. Pure.

        Args:
            round: from 1.
            client: its partition id.
            state: name -> tensor, the model's parameters and floating-point buffers.

        Returns:
            Same names and shapes; `state` itself where nothing changes.
        """
        return state
