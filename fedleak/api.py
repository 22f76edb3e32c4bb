"""Attack captures from Python: the second line of an audit of one's own Flower app."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from fedleak.attacks import Attack, Knowledge, Reconstruction
from fedleak.attacks.store import ReconstructionStore
from fedleak.capture import CaptureStore
from fedleak.errors import UsageError


def attack(
    captures: str | Path,
    model: nn.Module,
    method: str | Attack = "idlg",
    *,
    image_shape: tuple[int, int, int] | None = None,
    classes: int | None = None,
    auxiliary: tuple[Tensor, Tensor] | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    seed: int = 0,
    keep: str | Path | None = None,
) -> list[Reconstruction]:
    """Attack every update that an `Eavesdropper` captured.

    Args:
        captures: the eavesdropper's folder.
        model: the shared architecture, taking images in [0, 1] (make normalisation its first layer).
        method: an attack, or a choice of the ``attack`` group, see ``fedleak list``.
        image_shape, classes: (C, H, W) and number of classes, where the eavesdropper was not told.
        auxiliary: images ``[M, C, H, W]`` in [0, 1] and labels ``[M]`` the attacker holds of its own.
        overrides: more Hydra overrides for a `method` chosen by name, such as ``attack.restarts=4``.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: decides every random choice.
        keep: folder to keep reconstructions in as they finish; a killed attack goes on from there.

    Returns:
        A reconstruction an update, by round and client.

    Raises:
        UsageError: no captures, a damaged one, or an attack that needs more than was granted.
    """
    from fedleak.devices import resolve_device
    from fedleak.setup import compose

    store = CaptureStore.open(Path(captures))
    # The command line's threat model is not this app's: the one that was captured under counts.
    threat = replace(store.info.threat, auxiliary_data=auxiliary is not None)
    if isinstance(method, Attack) and overrides:
        raise UsageError(f"overrides={list(overrides)}: would change nothing of an attack that is made; leave them out")
    built = method if isinstance(method, Attack) else compose([f"attack={method}", *overrides]).attack.build()
    if built is None:
        raise UsageError("method=none: there is nothing to do; choose an attack, see fedleak list")
    shape, count = image_shape or store.info.image_shape, classes or store.info.classes
    if shape is None or count is None:
        raise UsageError("image_shape, classes: unknown; name them here or when making the Eavesdropper")
    return built(
        store.load(threat=threat),
        Knowledge(model, shape, count, threat, auxiliary),
        device=resolve_device(device),
        seed=seed,
        store=ReconstructionStore(Path(keep)) if keep is not None else None,
    )
