"""Several federations for one study, each the user's configuration with a few changes, each in a folder of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from fedleak import pipeline
from fedleak.attacks import Attack, Updates
from fedleak.config import compose_config, plain
from fedleak.errors import UsageError
from fedleak.outcome import Outcome
from fedleak.prepare import prepare
from fedleak.setup import Setup, read
from fedleak.studies.base import Job

Cells = Mapping[str, Sequence[str]]
"""A cell's name, which is its folder's, -> overrides on top of the user's: ``{"noise": ["defense=gaussian"]}``."""


def cell_setup(job: Job, changes: Sequence[str]) -> Setup:
    """One federation: what the user typed, then `changes`."""
    return read(_compose(job, changes))


def _compose(job: Job, changes: Sequence[str]) -> dict[str, Any]:
    return plain(compose_config([*job.overrides, *changes])) | {"study": None, "quick": False}


def cell_attack(job: Job, key: str, changes: Sequence[str]) -> tuple[Attack, Setup]:
    """The attack of one cell, and the cell.

    Args:
        job: the study's.
        key: where `changes` stand in the configuration, for error messages.
        changes: overrides that choose an attack.

    Raises:
        UsageError: there is no attack, or it cannot be used on such a federation.
    """
    setup = cell_setup(job, changes)
    attack = setup.attack.build()
    if attack is None:
        raise UsageError(f"{key}: attacks nothing; choose an attack, see fedleak list")
    if not isinstance(attack.view, Updates):
        raise UsageError(f"{key}: its updates are of clients that share no model; leave attack.view out")
    setup.check_attack(attack)
    return attack, setup


def check_cells(job: Job, cells: Cells) -> Iterator[Setup]:
    """Every federation, before any runs; raises `UsageError` for one that is refused."""
    for changes in cells.values():
        setup = cell_setup(job, changes)
        prepare(setup)
        yield setup


def run_cells(job: Job, cells: Cells) -> Iterator[tuple[str, Outcome]]:
    """Run the federations one after the other, each into ``job.folder/NAME``; yields each as it finishes.

    A folder holds what a plain run's does, so that ``fedleak attack run_dir=`` and ``fedleak report`` take it.
    """
    for number, (name, changes) in enumerate(cells.items(), 1):
        config, folder = _compose(job, changes), job.folder / name
        begun = job.resume and (folder / ".hydra" / "overrides.yaml").exists()
        job.console.headline(f"{number} of {len(cells)}: {name}")
        began = time.perf_counter()
        command = [*job.overrides, *changes]
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(config), folder / ".hydra" / "config.yaml")
        OmegaConf.save(OmegaConf.create(command), folder / ".hydra" / "overrides.yaml")
        words = ["fedleak", "run", *command]
        outcome = pipeline.run(read(config), folder, job.console, words, resume=begun)
        job.console.headline(f"{name}: {time.perf_counter() - began:.0f} s")
        yield name, outcome
