"""fedleak: a federated-learning simulator with an attacker inside.

`fedleak.tap` records what a Flower app's server sends and hears, for ``fedleak audit``. `fedleak.Eavesdropper` wraps
the strategy of a Flower app and captures what every client sends; `fedleak.attack` attacks the captures.
`fedleak.attacks` is the engine on its own and needs torch and numpy only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["CaptureStore", "Eavesdropper", "Observation", "ThreatModel", "attack", "note_truth", "tap"]

if TYPE_CHECKING:
    from fedleak.api import attack
    from fedleak.audit.tap import tap
    from fedleak.audit.truth import note_truth
    from fedleak.capture import CaptureStore, Observation
    from fedleak.federation.eavesdropper import Eavesdropper
    from fedleak.threat import ThreatModel

_HOME = {
    "CaptureStore": "fedleak.capture",
    "Eavesdropper": "fedleak.federation.eavesdropper",
    "Observation": "fedleak.capture",
    "ThreatModel": "fedleak.threat",
    "attack": "fedleak.api",
    "note_truth": "fedleak.audit.truth",
    "tap": "fedleak.audit.tap",
}


def __getattr__(name: str) -> Any:
    # Lazily, so that the attacks import without Flower and the command line starts quickly.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fedleak' has no attribute {name!r}")
