"""Several federations for one study, each the user's configuration with a few changes, each in a folder of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from fedleak import pipeline
from fedleak.attacks import Attack
from fedleak.config import check, compose_config, plain
from fedleak.errors import UsageError
from fedleak.pipeline import Outcome
from fedleak.studies.base import Job
from fedleak.threat import ThreatModel

Cells = Mapping[str, Sequence[str]]
"""A cell's name, which is its folder's, -> overrides on top of the user's: ``{"noise": ["defense=gaussian"]}``."""


def cell_config(job: Job, changes: Sequence[str]) -> dict[str, Any]:
    """The configuration of one federation: what the user typed, then `changes`."""
    return plain(compose_config([*job.overrides, *changes])) | {"study": None, "quick": False}


def cell_attack(job: Job, key: str, changes: Sequence[str]) -> tuple[Attack, ThreatModel]:
    """The attack of one cell and what it is granted.

    Args:
        job: the study's.
        key: where `changes` stand in the configuration, for error messages.
        changes: overrides that choose an attack.

    Raises:
        UsageError: there is no attack, or it cannot be used on such a federation.
    """
    config = cell_config(job, changes)
    check(config)
    attack = pipeline.build_attack(config)
    if attack is None:
        raise UsageError(f"{key}: attacks nothing; choose an attack, see fedleak list")
    pipeline.check_attack(attack, config)
    return attack, ThreatModel(**config["threat"])


def check_cells(job: Job, cells: Cells) -> None:
    """Raise `UsageError` for the first federation that is refused, before any runs."""
    for changes in cells.values():
        config = cell_config(job, changes)
        check(config)
        pipeline.prepare(config)


def run_cells(job: Job, cells: Cells) -> Iterator[tuple[str, Outcome]]:
    """Run the federations one after the other, each into ``job.folder/NAME``; yields each as it finishes.

    A folder holds what a plain run's does, so that ``fedleak attack run_dir=`` and ``fedleak report`` take it.
    """
    for number, (name, changes) in enumerate(cells.items(), 1):
        config, folder = cell_config(job, changes), job.folder / name
        job.console.headline(f"{number} of {len(cells)}: {name}")
        began = time.perf_counter()
        command = [*job.overrides, *changes]
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(config), folder / ".hydra" / "config.yaml")
        OmegaConf.save(OmegaConf.create(command), folder / ".hydra" / "overrides.yaml")
        outcome = pipeline.run(config, folder, job.console, ["fedleak", "run", *command])
        job.console.headline(f"{name}: {time.perf_counter() - began:.0f} s")
        yield name, outcome
