"""One cell of the frontier: a federation under one defense, and what every attacker makes of some of its updates."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fedleak import pipeline
from fedleak.attacks.inversion.map.attack import image_prior
from fedleak.console import Console
from fedleak.defenses import Defense
from fedleak.evaluation.limits import limit_of, limits_of
from fedleak.evaluation.lpips import LPIPS, load_lpips
from fedleak.evaluation.matching import Match, match
from fedleak.evaluation.metrics import label_accuracy
from fedleak.federation.scenario import build_scenario
from fedleak.instantiate import locate
from fedleak.limit import Limit
from fedleak.outcome import write_csv
from fedleak.seeding import generator
from fedleak.setup import Setup, compose
from fedleak.studies.captured import Captured, load_captured
from fedleak.studies.frontier.recogniser import Recogniser, train_recogniser

COLUMNS = (
    "defense",
    "strength",
    "attacker",
    "seed",
    "round",
    "test_accuracy",
    "epsilon",
    "label_accuracy",
    "mse",
    "psnr",
    "ssim",
    "recovered",
    "recognised",
    "limit_mse",
    "limit_bits",
    "lpips",
)
"""Columns of ``frontier.csv``, a row an attacked moment: means over its images."""

CLEAN, CONTROL = "none", "control"
"""No defense at all; and, of the same federation, noise with the norms of every tensor of the update, in its place."""
_MOST_DECIBELS = 150.0
"""Of an image that is exact to the last digit."""
_GUESS = 0.1
"""Chance of a reconstruction without any update, that the formal bound starts from: one of ten known candidates."""
SHOWN = 3
"""Pairs of images that a cell keeps for the pictures."""


@dataclass(frozen=True)
class Cell:
    """A federation, and what is tried on it; plain, so that another process can have it.

    Attributes:
        defense, strength, seed: which.
        overrides: of the federation, the user's own among them.
        attackers: name -> overrides.
        moments: rounds whose updates are attacked.
        victims: updates of each moment.
        delta: of (ε, δ).
        folder: of the federation's run.
        lpips: folder of LPIPS's weights, None for no such column.
    """

    defense: str
    strength: float
    seed: int
    overrides: tuple[str, ...]
    attackers: Mapping[str, tuple[str, ...]]
    moments: tuple[int, ...]
    victims: int
    delta: float
    folder: Path
    lpips: str | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        return self.folder.name

    @property
    def rows(self) -> Path:
        """Its part of ``frontier.csv``; there when the cell is done."""
        return self.folder / "frontier.csv"

    @property
    def images(self) -> Path:
        """Its pairs of images: attacker -> ``[N, 2, C, H, W]``."""
        return self.folder / "images.npz"

    def setup(self, attacker: str | None = None) -> Setup:
        """The federation without an attack, or with an attacker."""
        return compose([*self.overrides, *(self.attackers[attacker] if attacker else ["attack=none"])])


def run_cell(cell: Cell) -> str:
    """Run the federation, attack it, write what came out; returns the cell's name. For a process of its own."""
    torch.set_num_threads(1)
    setup = cell.setup()
    quiet = Console(quiet=True)
    shutil.rmtree(cell.folder, ignore_errors=True)  # what a killed one left half done
    done = pipeline.run(setup, cell.folder, quiet)
    captured = load_captured(setup, cell.folder).some(cell.moments, cell.victims)
    defense = setup.defense.build(Defense)
    cost = {"test_accuracy": done.summary["final_test_accuracy"], "epsilon": promises(setup, defense, cell.delta)[0]}
    recogniser = train_recogniser(build_scenario(setup).data, setup.seed)
    rows, shown = _attacked(cell, cell.defense, captured, defense, recogniser, cost)
    if cell.defense == CLEAN:
        noise = replace(captured, observations=[replace(o, update=_like(o, cell.seed)) for o in captured.observations])
        more, images = _attacked(cell, CONTROL, noise, None, recogniser, dict.fromkeys(cost))
        rows, shown = rows + more, shown | images
    np.savez_compressed(cell.images, **{name: pairs.numpy() for name, pairs in shown.items()})  # type: ignore[arg-type]
    write_csv(pd.DataFrame(rows, columns=list(COLUMNS)), cell.rows)
    return cell.name


def _attacked(
    cell: Cell,
    name: str,
    captured: Captured,
    defense: Defense | None,
    recogniser: Recogniser,
    cost: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Rows of every attacker and moment, and ``defense:attacker`` -> pairs of images."""
    rows, shown = [], {}
    eyes = None if cell.lpips is None else load_lpips(cell.lpips, "frontier.lpips")
    limits = {} if defense is None else _limits(cell, captured, defense)
    strength = cell.strength if defense is not None else 1.0
    for attacker in cell.attackers:
        setup = cell.setup(attacker)
        attack = setup.attack.build()
        assert attack is not None  # checked before
        knowledge = replace(_knowledge(cell, setup), defense=defense if setup.threat.defense else None)
        found = attack(captured.observations, knowledge, device=setup.torch_device, seed=cell.seed)
        pairs: list[Match] = []
        for moment in cell.moments:
            here = [i for i, o in enumerate(captured.observations) if o.round == moment]
            if not here:
                continue
            matches = [m for i in here for m in match(found[i], captured.truths[i])]
            labels = [label_accuracy(captured.truths[i].labels, found[i].labels) for i in here]
            possible = [limits[i] for i in here if i in limits]
            who = {"defense": name, "strength": strength, "attacker": attacker, "seed": cell.seed, "round": moment}
            rows.append(
                who
                | dict(cost)
                | {"label_accuracy": _mean(labels)}
                | _leak(matches, recogniser)
                | _possible(possible)
                | {"lpips": _perceived(matches, eyes)}
            )
            pairs += matches
        kept = [p for p in pairs if p.true is not None and p.rebuilt is not None][:: max(1, len(pairs) // SHOWN)][
            :SHOWN
        ]
        if kept:
            shown[f"{name}:{attacker}"] = torch.stack([torch.stack([p.true, p.rebuilt.float()]) for p in kept])  # type: ignore[list-item, union-attr]
    return rows, shown


def _knowledge(cell: Cell, setup: Setup) -> Any:
    from fedleak.capture import CaptureStore

    return pipeline.attacker_knowledge(setup, CaptureStore.open(cell.folder / "captures"))


def _limits(cell: Cell, captured: Captured, defense: Defense) -> dict[int, Limit]:
    """index -> limit, for the best informed of the attackers: its prior, and the defense known."""
    setups = [cell.setup(name) for name in cell.attackers]
    best = max(setups, key=lambda setup: setup.threat.auxiliary_data)
    knowledge, training = _knowledge(cell, best), best.training
    if not limits_of(captured.observations[:1], captured.truths[:1], knowledge, training, defense):
        return {}
    prior = image_prior(knowledge)
    pairs = enumerate(zip(captured.observations, captured.truths, strict=True))
    return {i: limit_of(o, truth, knowledge, training, defense, prior) for i, (o, truth) in pairs}


def _leak(matches: Sequence[Match], recogniser: Recogniser) -> dict[str, Any]:
    """What was rebuilt, as means over images; one that nothing was rebuilt of is neither recovered nor recognised."""
    rebuilt = [m for m in matches if m.rebuilt is not None and m.label_true is not None]
    named = 0
    if rebuilt:
        images = torch.stack([m.rebuilt.float() for m in rebuilt])  # type: ignore[union-attr]
        named = int((recogniser(images) == torch.tensor([m.label_true for m in rebuilt])).sum())
    decibels = [min(m.psnr, _MOST_DECIBELS) for m in matches if m.psnr is not None]
    return {
        "mse": _mean([m.mse for m in matches]),
        "psnr": _mean(decibels),
        "ssim": _mean([m.ssim for m in matches]),
        "recovered": _mean([float(bool(m.recovered)) for m in matches]),
        "recognised": named / len(matches) if matches else None,
    }


def _perceived(matches: Sequence[Match], eyes: LPIPS | None) -> float | None:
    """Mean LPIPS of what was rebuilt, nothing without its weights."""
    pairs = [(m.true, m.rebuilt) for m in matches if m.true is not None and m.rebuilt is not None]
    if eyes is None or not pairs:
        return None
    true, rebuilt = (torch.stack([each.float() for each in side]) for side in zip(*pairs, strict=True))
    return _mean(eyes(true, rebuilt.clamp(0, 1)).tolist())


def _possible(limits: Sequence[Limit]) -> dict[str, Any]:
    errors = [float(error) for found in limits for error in found.mse]
    return {"limit_mse": _mean(errors), "limit_bits": _mean([found.bits for found in limits])}


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean to four digits of what is known, None of nothing."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(f"{sum(known) / len(known):.4g}") if known else None


def promises(setup: Setup, defense: Defense, delta: float) -> tuple[float | None, float | None]:
    """ε of a whole federation, and the most that the chance of a reconstruction can be; of the client with the fewest
    images. None without a promise, or an infinite one."""
    federation = setup.federation
    fewest = min(len(part) for part in build_scenario(setup).parts)
    rate = min(1.0, federation.batch_size / max(1, fewest))
    steps = {"rounds": federation.rounds, "local_steps": federation.local_steps, "sample_rate": rate}
    found = defense.epsilon(**steps, delta=delta), defense.reconstruction(**steps, guess=_GUESS)  # type: ignore[arg-type]
    first, second = (None if v is None or not math.isfinite(v) else float(f"{v:.4g}") for v in found)
    return first, second


def _like(observation: Any, seed: int) -> dict[str, Tensor]:
    """Noise with the root mean square of every tensor of an update."""
    random = generator(seed, "frontier", CONTROL, observation.round, observation.client)
    origin = observation.parameters if observation.training.payload == "weights" else {}
    made = {}
    for name, value in observation.update.items():
        change = value - origin[name] if name in origin else value
        noise = change.square().mean().sqrt() * torch.randn(value.shape, generator=random)
        made[name] = noise + origin[name] if name in origin else noise
    return made


def knob_of(target: str) -> str | None:
    """The setting that says how strong a defense is, as its class names it."""
    return getattr(locate(target, "defense"), "knob", None)
