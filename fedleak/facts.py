"""What was run, in words: for a headline, `summary.json` and the report."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fedleak import __version__
from fedleak.devices import device_name
from fedleak.federation.adversary import Adversary
from fedleak.instantiate import Part
from fedleak.setup import Setup


def describe(setup: Setup) -> str:
    """One line: who attacks what, where."""
    f = setup.federation
    return (
        f"{f.clients} clients × {f.rounds} rounds on {setup.data.name}, {setup.model.name}, "
        f"batch size {f.batch_size}, {f.payload} payload, attack {setup.attack.name}, "
        f"defense {defense_name(setup.defense)}, seed {setup.seed}, on {setup.torch_device}"
    )


def facts(setup: Setup, seconds: float, command: Sequence[str]) -> dict[str, Any]:
    """What was run, plain JSON."""
    return {
        "command": shlex.join(command),
        "seconds": round(seconds, 3),
        "seed": setup.seed,
        "device": device_name(setup.torch_device),
        "attack": setup.attack.name,
        "defense": defense_name(setup.defense),
        "data": setup.data.name,
        "partition": setup.partition.name.lower(),
        "model": setup.model.name,
        "federation": asdict(setup.federation),
        "threat": {
            "kind": "honest-but-curious" if type(setup.adversary.build(Adversary)) is Adversary else "malicious",
            "view": setup.threat.view,
            "granted": setup.threat.granted,
            "withheld": setup.threat.withheld,
        },
        "versions": versions(),
    }


def defense_name(defense: Part) -> str:
    """The defense and its strength in a word: ``gaussian(std=0.1)``; a switch that is off is not mentioned."""
    name = defense.name.lower()
    if name == "nodefense":
        return "none"
    said = {k: v for k, v in defense.settings.items() if isinstance(v, int | float | str) and v is not False}
    strengths = ", ".join(f"{k}={v}" for k, v in said.items())
    return f"{name}({strengths})" if strengths else name


def versions() -> dict[str, str]:
    """What was used, name -> version."""
    return {"fedleak": __version__, "python": platform.python_version()} | {
        name: _version(name) for name in ("torch", "torchvision", "flwr", "numpy")
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
