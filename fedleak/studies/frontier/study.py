"""The frontier: defenses × strengths × seeds, each a federation attacked in several ways, in parallel processes."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fedleak import __version__
from fedleak.config import Rule, is_number, whole
from fedleak.defenses import Defense
from fedleak.errors import UsageError
from fedleak.evaluation.lpips import load_lpips
from fedleak.outcome import write_csv, write_json
from fedleak.prepare import prepare
from fedleak.setup import named
from fedleak.studies.base import Job, Study, require
from fedleak.studies.frontier.cells import CLEAN, COLUMNS, CONTROL, Cell, knob_of, promises, run_cell
from fedleak.studies.frontier.page import write_page
from fedleak.studies.frontier.pictures import draw_frontier, draw_images, draw_privacy
from fedleak.studies.frontier.ranking import draw_ranking, rank
from fedleak.studies.frontier.summary import summarise

_ABOVE = Rule(lambda v: is_number(v) and 0 < v < 1, "a number between 0 and 1")
_SHARE = Rule(lambda v: is_number(v) and 0 <= v <= 1, "a number between 0 and 1, such as 0.02 for two points")
_AUTO = Rule(lambda v: v == "auto" or whole(1).test(v), "a whole number of at least 1, or auto")


@dataclass
class Frontier(Study):
    """What each defense costs, what every attacker gets through it, and what nobody could.

    Args:
        defenses: choice of the ``defense`` group -> strengths, values of the setting that its class names in `knob`; an
            empty list for the choice as it stands. ``none`` and, of it, the control are always there.
        attackers: name -> overrides that choose an attack and what it is granted.
        federations: name -> overrides that make another federation of it, for what protects by other means:
            a model with a bottleneck, larger batches, Flower's own strategies of differential privacy.
        seeds: federations of each defense and strength.
        moments: rounds whose updates are attacked.
        victims: updates of each moment.
        delta: the δ of (ε, δ).
        cost: test accuracy that a defense of the ranking may cost, as a share, in the mean over seeds.
        lpips: folder of LPIPS's weights (see `load_lpips`), None to leave its column empty.
        processes: cells at a time, or ``auto`` for one a core.
    """

    defenses: Mapping[str, Sequence[Any] | None]
    attackers: Mapping[str, Sequence[str]]
    federations: Mapping[str, Sequence[str]] | None = None
    seeds: int = 1
    moments: Sequence[int] = (1,)
    victims: int = 1
    delta: float = 1e-5
    cost: float = 0.02
    lpips: str | None = None
    processes: int | str = "auto"

    def __post_init__(self) -> None:
        for name in ("seeds", "victims"):
            require(name, getattr(self, name), whole(1), "frontier")
        require("delta", self.delta, _ABOVE, "frontier")
        require("cost", self.cost, _SHARE, "frontier")
        require("processes", self.processes, _AUTO, "frontier")
        moments = Rule(
            lambda v: isinstance(v, list | tuple) and len(v) > 0 and all(whole(1).test(m) for m in v), "rounds, from 1"
        )
        require("moments", self.moments, moments, "frontier")
        mapping = Rule(lambda v: isinstance(v, Mapping) and len(v) > 0, "choices with a list each, such as {sign: []}")
        require("defenses", self.defenses, mapping, "frontier")
        require("attackers", self.attackers, mapping, "frontier")
        for name, overrides in (self.federations or {}).items():
            if name in self.defenses or name in (CLEAN, CONTROL):
                raise UsageError(f"frontier.federations.{name}: a defense has that name; choose another")
            rule = Rule(_words, "a list of overrides, such as ['model=lenet_precode']")
            require(f"federations.{name}", overrides, rule, "frontier")
        for name, strengths in self.defenses.items():
            rule = Rule(
                lambda v: v is None or isinstance(v, list | tuple), "a list of strengths, [] for the choice as it is"
            )
            require(f"defenses.{name}", strengths, rule, "frontier")

    def check(self, job: Job) -> None:
        """A cell of every defense and strength is composed and prepared, with every attacker, before any runs."""
        self._fingerprint(job)
        if self.lpips is not None:
            load_lpips(self.lpips, "frontier.lpips")
        for cell in (cell for cell in self._cells(job) if cell.seed == job.seed):
            setup = cell.setup()
            prepare(setup)
            beyond = [moment for moment in self.moments if moment > setup.federation.rounds]
            if beyond:
                raise UsageError(
                    f"frontier.moments={list(self.moments)}: the federation has {setup.federation.rounds} rounds; "
                    f"leave {beyond[0]} out, or let federation.rounds={beyond[0]}"
                )
            for name in self.attackers:
                attacked = cell.setup(name)
                if attacked.attack.build() is None:
                    raise UsageError(f"frontier.attackers.{name}: attacks nothing; choose an attack, see fedleak list")
                prepare(attacked)

    def run(self, job: Job) -> pd.DataFrame:
        """Run what is not done yet, then write ``frontier.csv``, ``summary.csv``, ``ranking.csv``, pictures, page."""
        cells = self._cells(job)
        write_json({"settings": self._fingerprint(job)}, job.folder / "frontier.json")
        todo = [cell for cell in cells if not cell.rows.exists()]
        with job.console.steps("cells", len(cells)) as advance:
            if len(todo) < len(cells):
                advance(len(cells) - len(todo), "found done")
            for name in _side_by_side(todo, self._processes(len(todo))):
                advance(1, name)
                self._gather(cells, job)
        frame = self._gather(cells, job)
        summary = self._with_bounds(summarise(frame), cells)
        write_csv(summary, job.folder / "summary.csv")
        ranking = rank(summary, self.cost)
        write_csv(ranking, job.folder / "ranking.csv")
        draw_ranking(ranking, self.cost, job.folder / "ranking.png")
        draw_frontier(summary, job.folder / "frontier.png")
        draw_privacy(summary, job.folder / "privacy.png")
        draw_images(cells, frame, job.folder / "images.png")
        write_page(summary, job.folder, list(self.attackers), self.cost)
        shown = ["defense", "strength", "attacker", "test_accuracy", "epsilon", "label_accuracy", "mse", "recovered"]
        return summary[[*shown, "recognised", "limit_mse"]]

    def _gather(self, cells: Sequence[Cell], job: Job) -> pd.DataFrame:
        """All rows so far, in ``frontier.csv`` too."""
        parts = [part for cell in cells if cell.rows.exists() and len(part := pd.read_csv(cell.rows))]
        frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(COLUMNS))
        write_csv(frame, job.folder / "frontier.csv")
        return frame

    def _with_bounds(self, summary: pd.DataFrame, cells: Sequence[Cell]) -> pd.DataFrame:
        """The summary with the most that the chance of a reconstruction can be, where a defense promises that."""
        bounds = {}
        for cell in cells:
            if cell.seed == min(other.seed for other in cells):
                setup = cell.setup()
                bounds[cell.defense, cell.strength] = promises(setup, setup.defense.build(Defense), cell.delta)[1]
        keys = zip(summary["defense"], summary["strength"], strict=True)
        return summary.assign(reconstruction_bound=pd.Series([bounds.get(key) for key in keys], dtype=float))

    def _processes(self, cells: int) -> int:
        most = os.cpu_count() or 1 if self.processes == "auto" else int(self.processes)
        return max(1, min(most, cells))

    def _cells(self, job: Job) -> list[Cell]:
        """Every federation; the undefended one first."""
        typed = [o for o in job.overrides if not o.lstrip("+~").startswith(("frontier", "output_dir", "seed="))]
        settings = {f"federation.{key}": value for key, value in vars(job.setup.federation).items()}
        base = [*typed, *(f"{key}={json.dumps(value)}" for key, value in settings.items())]
        strengths = {CLEAN: [], **{name: list(values or []) for name, values in self.defenses.items()}}
        if CONTROL in strengths:
            raise UsageError(f"frontier.defenses.{CONTROL}: always there; leave it out")
        parts = named("defense", list(strengths), job.overrides, "frontier.defenses")
        cells = []
        for name, values in strengths.items():
            knob = knob_of(parts[name].target)
            if values and (knob is None or knob not in parts[name].node):
                raise UsageError(
                    f"frontier.defenses.{name}={values}: its class names no knob that is a setting of it, whose values "
                    "these could be; write []"
                )
            for value in values or [None]:
                strength = 0.0 if name == CLEAN else _strength(value, knob, parts[name].node)
                own = [f"defense={name}", *([] if value is None else [f"defense.{knob}={value}"])]
                text = name if value is None else f"{name}-{value}"
                cells += self._of(job, name, strength, (*base, *own), text)
        for name, overrides in (self.federations or {}).items():
            cells += self._of(job, name, 1.0, (*base, *overrides), name)
        return cells

    def _of(self, job: Job, name: str, strength: float, overrides: tuple[str, ...], text: str) -> list[Cell]:
        """A cell for each seed."""
        return [
            Cell(
                defense=name,
                strength=strength,
                seed=seed,
                overrides=(*overrides, f"seed={seed}"),
                attackers={who: tuple(how) for who, how in self.attackers.items()},
                moments=tuple(self.moments),
                victims=self.victims,
                delta=self.delta,
                folder=job.folder / "cells" / f"{text}-seed-{seed}",
                lpips=self.lpips,
            )
            for seed in range(job.seed, job.seed + self.seeds)
        ]

    def _fingerprint(self, job: Job) -> str:
        """What decides a cell's rows; raises `UsageError` where the folder holds cells of other settings."""
        kept = {
            key: value
            for key, value in vars(self).items()
            if key not in ("defenses", "federations", "seeds", "processes", "cost")
        }
        own = {
            k: v for k, v in job.setup.settings.items() if not k.startswith(("study", "output_dir", "seed", "hydra"))
        }
        found = hashlib.sha256(json.dumps([kept, own, __version__], sort_keys=True, default=str).encode()).hexdigest()[
            :12
        ]
        path = job.folder / "frontier.json"
        if path.exists() and json.loads(path.read_text()).get("settings") != found:
            raise UsageError(
                f"output_dir={job.folder}: holds a frontier of other settings, which cannot be gone on with; name "
                "another, or remove it"
            )
        return found


def _words(value: Any) -> bool:
    """Whether a setting is a list of words, and has one."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(word, str) for word in value)


def _strength(value: Any, knob: str | None, node: Mapping[str, Any]) -> float:
    """A strength as a number: the setting's, 1 where it is none or a word."""
    given = value if value is not None else node.get(knob) if knob is not None else None
    return float(given) if given is not None and is_number(given) else 1.0


def _side_by_side(cells: Sequence[Cell], processes: int) -> Any:
    """The names of cells as they finish, some at a time."""
    if processes <= 1:
        yield from (run_cell(cell) for cell in cells)
        return
    context = multiprocessing.get_context("spawn")  # forked threads of torch would hang
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(run_cell, cell) for cell in cells]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise
