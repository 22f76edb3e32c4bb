"""What the attacker is granted: the threat model as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from fedleak.errors import UsageError


@dataclass(frozen=True)
class ThreatModel:
    """An honest-but-curious server and what it knows besides each client's update and the model, which it always has.

    Attributes:
        batch_size: how many samples each client trained on.
        hyperparameters: the client's learning rate and number of local steps.
        buffers: the BatchNorm buffers that a client returns.
        auxiliary_data: labelled images of the same distribution, disjoint from the clients' own.
        labels: the labels of each private batch, in no particular order.
        per_sample_gradients: the gradient of every single sample (iDLG's per-sample scenario).
        defense: what the clients defend themselves with, and its settings.
        view: what of each round the attacker gets to see: every client's update (``updates``), their sum alone, as
            under secure aggregation (``sum``), or the models that the server sent out alone, as a curious client or a
            wire-tapper has them (``models``).
    """

    batch_size: bool = True
    hyperparameters: bool = True
    buffers: bool = True
    auxiliary_data: bool = False
    labels: bool = False
    per_sample_gradients: bool = False
    defense: bool = False
    view: str = "updates"

    @property
    def granted(self) -> tuple[str, ...]:
        """Names of what is granted, in declaration order."""
        return tuple(name for name in GRANTS if getattr(self, name))

    @property
    def withheld(self) -> tuple[str, ...]:
        """Names of what is not granted, in declaration order."""
        return tuple(name for name in GRANTS if not getattr(self, name))

    def require(self, needs: Iterable[str], who: str) -> None:
        """Raise `UsageError` if `who` (say ``attack=dlg``) needs something that is not granted."""
        missing = [need for need in sorted(needs) if not getattr(self, need)]
        if missing:
            mend = " ".join(f"threat.{need}=true" for need in missing)
            raise UsageError(
                f"{who} needs {', '.join(missing)}, which the threat model withholds; grant it with {mend}"
            )


GRANTS = tuple(f.name for f in fields(ThreatModel) if isinstance(f.default, bool))
"""What is granted or withheld, in declaration order."""
VIEWS = ("updates", "sum", "models")
