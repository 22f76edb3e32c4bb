"""Attack captures from Python: the second line of an audit of one's own Flower app."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from fedleak.attacks import Attack, Knowledge, Reconstruction
from fedleak.attacks.store import ReconstructionStore
from fedleak.audit.screen import contradictions, usable
from fedleak.capture import CaptureStore
from fedleak.errors import UsageError
from fedleak.models.normalized import normalized

log = logging.getLogger("fedleak")


def attack(
    captures: str | Path,
    model: nn.Module,
    method: str | Attack = "fedleak",
    *,
    image_shape: tuple[int, int, int] | None = None,
    classes: int | None = None,
    auxiliary: tuple[Tensor, Tensor] | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    seed: int = 0,
    keep: str | Path | None = None,
    normalize: tuple[Sequence[float] | float, Sequence[float] | float] | None = None,
) -> list[Reconstruction]:
    """Attack every update that an `Eavesdropper` captured.

    Args:
        captures: the eavesdropper's folder.
        model: the shared architecture, taking images in [0, 1], or normalised ones: then say how by `normalize`.
        method: an attack, or a choice of the ``attack`` group, see ``fedleak list``. ``fedleak`` takes any batch;
            ``dlg`` and ``idlg`` are for single samples.
        image_shape, classes: (C, H, W) and number of classes, where the eavesdropper was not told.
        auxiliary: images ``[M, C, H, W]`` in [0, 1] and labels ``[M]`` the attacker holds of its own.
        overrides: more Hydra overrides for a `method` chosen by name, such as ``attack.restarts=4``.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: decides every random choice.
        keep: folder to keep reconstructions in as they finish; a killed attack goes on from there.
        normalize: (mean, std) by which clients normalise images in [0, 1], one number or one a channel.

    Returns:
        A reconstruction an update, by round and client. An update that holds nothing has no images and says so as its
        stop reason; where what was stated of the clients cannot be true, ``details["contradiction"]`` says why.

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
    knowledge = Knowledge(
        model if normalize is None else normalized(model, *normalize), shape, count, threat, auxiliary
    )
    observations = [usable(observation) for observation in store.load(threat=threat)]
    results = built(
        observations,
        knowledge,
        device=resolve_device(device),
        seed=seed,
        store=ReconstructionStore(Path(keep)) if keep is not None else None,
    )
    faults = contradictions(observations, knowledge)
    for result in results:
        if (fault := faults.get((result.round, result.client))) is not None:
            result.details["contradiction"] = fault
    if faults:
        log.warning("%d of %d updates: %s", len(faults), len(observations), next(iter(faults.values())))
    return results
