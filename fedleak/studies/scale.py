"""What a federation costs as it grows: with an eavesdropper, without one, and beside a plain copy of the same bytes."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedleak.attacks import Knowledge
from fedleak.capture import CaptureStore
from fedleak.config import list_of, whole
from fedleak.federation.client import make_client_app
from fedleak.federation.engine import LocalEngine
from fedleak.federation.scenario import build_scenario, shared_model
from fedleak.federation.server import RoundRow, make_server_app
from fedleak.outcome import write_csv
from fedleak.setup import Setup
from fedleak.shards import Background
from fedleak.studies.base import Job, Results, Study, require
from fedleak.studies.federations import Cells, cell_setup, check_cells
from fedleak.truth import TruthStore


@dataclass
class Scale(Study):
    """Pairs of the same federation, ``capture=all`` with the truth against ``capture=none``, one after the other.

    One quantity grows at a time: clients, the width of an MLP's hidden layer, the rounds of one federation, whose time
    and memory are noted round by round, and the victims of an attack. Nothing else should run on the machine.

    Args:
        clients: how many, each with `batch_sizes`.
        batch_sizes: of a client's step.
        widths: of the hidden layer of ``model=mlp``, 10 clients.
        rounds: of each federation of a pair.
        long: rounds of the federation that is looked at round by round, with the most clients of all.
        victims: updates that are attacked in one call, by the configuration's attack.
        pairs: of every kind; medians are shown.
    """

    clients: Sequence[int]
    batch_sizes: Sequence[int]
    widths: Sequence[int]
    rounds: int
    long: int
    victims: Sequence[int]
    pairs: int

    def __post_init__(self) -> None:
        for key in ("rounds", "long", "pairs"):
            require(key, getattr(self, key), whole(1))
        for key in ("clients", "batch_sizes", "widths", "victims"):
            require(key, getattr(self, key), list_of(1))

    def check(self, job: Job) -> None:
        """All federations can run, and the attack takes their updates."""
        cells = {name: ["attack=none", *changes] for name, changes in self._cells().items()}
        list(check_cells(job, {**cells, "victims": self._attacked(1)}))

    def _cells(self) -> Cells:
        cells = {
            f"clients={n} batch_size={b}": [f"federation.clients={n}", f"federation.batch_size={b}"]
            for n in self.clients
            for b in self.batch_sizes
        }
        few = ["federation.clients=10", "federation.batch_size=1", "model=mlp"]
        return cells | {f"width={w}": [*few, f"model.hidden=[{w}]"] for w in self.widths}

    def _attacked(self, count: int) -> list[str]:
        return [f"federation.clients={count}", "federation.rounds=1", "federation.batch_size=1", "attack.clients=all"]

    def run(self, job: Job) -> pd.DataFrame:
        """Write ``results.csv`` with a row a pair, ``rounds.csv`` a row a round, ``victims.csv``, ``summary.csv``."""
        results, attacks = job.results(), job.results("victims.csv")
        for name, changes in self._cells().items():
            for pair in range(self.pairs):
                row = self._pair(job, [*changes, f"federation.rounds={self.rounds}"], pair)
                results.add([{"federation": name, "pair": pair, **row}])
            job.console.headline(f"{name}: {results.rows[-1]}")
        most = ["attack=none", f"federation.clients={max(self.clients)}", f"federation.rounds={self.long}"]
        _long(job, [*most, "federation.batch_size=1"], job.results("rounds.csv"))
        for count in self.victims:
            attacks.add([{"victims": count, "seconds": _attack(job, self._attacked(count))}])
        summary = (
            results.frame.groupby("federation", sort=False).median(numeric_only=True).drop(columns="pair").round(4)
        )
        write_csv(summary.reset_index(), job.folder / "summary.csv")
        return summary.reset_index()

    def _pair(self, job: Job, changes: Sequence[str], pair: int) -> dict[str, Any]:
        folder = job.folder / "federation"
        costs = {}
        for capture in ("all", "none") if pair % 2 else ("none", "all"):
            costs[capture] = _federate(job, ["attack=none", *changes, f"capture={capture}"], folder / capture)
        size, files, copy = _copied(folder / "all")
        shutil.rmtree(folder)
        without, eavesdropped = costs["none"], costs["all"]
        return {
            "seconds": without[0],
            "seconds_captured": eavesdropped[0],
            "cpu": without[1],
            "cpu_captured": eavesdropped[1],
            "waited": without[2],
            "waited_captured": eavesdropped[2],
            "overhead": eavesdropped[0] / without[0] - 1,
            "cpu_overhead": eavesdropped[1] / without[1] - 1,
            "waited_overhead": eavesdropped[2] / without[2] - 1,
            "copy": copy,
            "megabytes": size / 2**20,
            "files": files,
        }


def _federate(job: Job, changes: Sequence[str], folder: Path) -> tuple[float, float, float]:
    """Seconds of a federation into `folder`: wall, processor, and those of them that were not the background's."""
    setup = cell_setup(job, changes)
    apps = _apps(setup, folder)
    began, spent, waited = time.perf_counter(), time.process_time(), time.thread_time()
    setup.engine.build().run(*apps, setup.federation.clients)
    return time.perf_counter() - began, time.process_time() - spent, time.thread_time() - waited


def _apps(setup: Setup, folder: Path, on_row: Callable[[RoundRow], None] | None = None) -> tuple[ServerApp, ClientApp]:
    """Server and client, which write as those of ``fedleak run``."""
    writer = Background() if isinstance(setup.engine.build(), LocalEngine) else None
    server = make_server_app(build_scenario(setup), folder, on_row=on_row, writer=writer)
    return server, make_client_app(setup, TruthStore(folder / "truth", writer))


def _kept(folder: Path) -> Iterator[Path]:
    """The files of captures and truth."""
    return (path for part in ("captures", "truth") for path in sorted((folder / part).iterdir()) if path.is_file())


def _copied(folder: Path) -> tuple[int, int, float]:
    """Bytes and files that were kept, and the seconds that writing the same bytes once more takes."""
    data = [path.read_bytes() for path in _kept(folder)]
    began = time.perf_counter()
    with (folder / "copy").open("wb") as file:
        for part in data:
            file.write(part)
    return sum(map(len, data)), len(data), time.perf_counter() - began


def _long(job: Job, changes: Sequence[str], rows: Results) -> None:
    """One federation, round by round: seconds, and the process's memory at the most so far."""
    setup, folder = cell_setup(job, changes), job.folder / "long"
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss in a MiB

    def on_row(row: RoundRow) -> None:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        rows.add([{"round": row.round, "seconds": row.seconds, "memory_mib": round(memory, 1)}])

    setup.engine.build().run(*_apps(setup, folder, on_row), setup.federation.clients)
    rows.rows[-1] = {**rows.rows[-1], "files": len(list(_kept(folder)))}
    rows.add([])
    shutil.rmtree(folder)


def _attack(job: Job, changes: Sequence[str]) -> float:
    """Seconds of the configuration's attack on all updates of one round."""
    setup, folder = cell_setup(job, changes), job.folder / "victims"
    scenario = build_scenario(setup)
    setup.engine.build().run(*_apps(setup, folder), setup.federation.clients)
    seen = CaptureStore.open(folder / "captures").load()
    shape, classes = scenario.image_shape, scenario.data.classes
    attack = setup.attack.build()
    assert attack is not None  # refused beforehand
    known = Knowledge(shared_model(setup, shape, classes, 0), shape, classes, setup.threat, scenario.auxiliary_data())
    began = time.perf_counter()
    attack(seen, known, device=job.device, seed=job.seed, seconds=setup.attack.seconds)
    shutil.rmtree(folder)
    return time.perf_counter() - began
