"""Frozen parameters: what is sent with the model and never trained."""

from __future__ import annotations

from torch import nn


def frozen_as_buffers(model: nn.Module) -> nn.Module:
    """`model`, changed in place: parameters that ask for no gradient become buffers of the same names.

    So clients, the server and every attack agree on what is trained: `named_parameters` is that and nothing else.
    """
    for module in model.modules():
        frozen = [name for name, value in module.named_parameters(recurse=False) if not value.requires_grad]
        for name in frozen:
            value = getattr(module, name).detach()
            delattr(module, name)
            module.register_buffer(name, value)
    return model
