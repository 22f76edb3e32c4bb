"""Where an attack's problems are solved: in this process, or in pieces on the devices of a Ray cluster."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import itertools
import logging
import os
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch

from fedleak.attacks import Attack, Knowledge
from fedleak.attacks.results import Progress, Reconstruction
from fedleak.attacks.store import ReconstructionStore
from fedleak.attacks.views import Updates
from fedleak.capture import Observation
from fedleak.errors import FedleakError, UsageError

MOMENT = 0.1
"""Seconds for which a worker gathers what is finished before it sends it home."""

PIECE = 64
"""Updates that are attacked together: more are hardly faster each, and fewer leave workers idle at the end."""


def require(executor: str) -> None:
    """Raise `UsageError` where an executor is not at hand."""
    if executor == "ray" and importlib.util.find_spec("ray") is None:
        raise UsageError(
            "attack.executor=ray: Ray is not installed here; pip install ray, or leave attack.executor=local"
        )


def find_modules() -> None:
    """Ray's workers are new processes: they must find the user's own modules too."""
    paths = [os.getcwd(), *sys.path, os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def pieces(seen: Sequence[Observation], todo: Sequence[int], workers: int, *, whole_clients: bool) -> list[list[int]]:
    """The places `todo` in runs of about `PIECE`, or fewer so that each worker has one.

    With many updates the pieces do not depend on the number of workers, and so neither do roundings.

    Args:
        seen: N observations.
        todo: places among them.
        workers: how many can work at once.
        whole_clients: a client's rounds are one problem.
    """
    groups: list[list[int]] = [[place] for place in todo]
    if whole_clients:
        of: dict[int, list[int]] = {}
        for place in todo:
            of.setdefault(seen[place].client, []).append(place)
        groups = list(of.values())
    size = max(1, min(PIECE, -(-len(groups) // workers)))
    return [list(itertools.chain(*groups[begin : begin + size])) for begin in range(0, len(groups), size)]


def attack_on_ray(
    attack: Attack,
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    device: torch.device,
    seed: int,
    seconds: float | None,
    store: ReconstructionStore,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Reconstruction]:
    """As `Attack.__call__`, each piece of the problems on a device of its own; `store` gets them as they finish.

    On a GPU cluster a piece has one GPU, otherwise one core and one thread. A cluster that is joined already, or that
    ``RAY_ADDRESS`` names, is used; else one is started on this machine, and ended.

    Raises:
        FedleakError: what a worker raised.
    """
    ray: Any = importlib.import_module("ray")
    seen = list(attack.view(observations))
    here = copy.copy(attack)
    here.view = Updates()  # what it shows is cut into pieces
    todo = [i for i, o in enumerate(seen) if o.error is None and store.load(o.round, o.client) is None]
    own = not ray.is_initialized()
    if own and todo:
        find_modules()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    try:
        if todo:
            kind = "GPU" if device.type == "cuda" else "CPU"
            workers = max(1, int(ray.cluster_resources().get(kind, 1)))
            needs = {"num_cpus": 1, "num_gpus": 1 if kind == "GPU" else 0}
            remote = ray.remote(**needs)(solve)
            parts = pieces(seen, todo, workers, whole_clients=attack.inversion.fixed_batches)
            known = ray.put((here, knowledge))
            running = [remote.remote(known, [seen[i] for i in part], str(device.type), seed, seconds) for part in parts]
            _gather(ray, running, len(todo), store, on_progress)
    finally:
        if own and todo:
            ray.shutdown()
    # All that was solved is in the store; what cannot be attacked is told of as ever.
    return here(seen, knowledge, device=device, seed=seed, seconds=seconds, store=store)


def _gather(
    ray: Any,
    running: Sequence[Any],
    problems: int,
    store: ReconstructionStore,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Keep what the pieces give, in whatever order they finish."""
    waiting, done, began = list(running), list[Reconstruction](), time.perf_counter()
    while waiting:
        for piece in ray.wait(waiting, num_returns=1)[0]:
            try:
                found = ray.get(next(piece))
            except StopIteration:
                waiting.remove(piece)
                continue
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, FedleakError) else error) from None
            for result in found:
                store.write(result)
            done += found
            if on_progress is not None:
                on_progress(_progress(done, problems, time.perf_counter() - began))


def _progress(done: Sequence[Reconstruction], problems: int, seconds: float) -> Progress:
    evaluations = sum(result.evaluations for result in done)
    return Progress(
        problems=problems,
        done=len(done),
        converged=sum(result.converged for result in done),
        diverged=sum(result.stop_reason == "diverged" for result in done),
        median_objective=statistics.median(result.objective for result in done),
        evaluations=evaluations,
        evaluations_per_second=evaluations / max(seconds, 1e-9),
    )


class _Outlet(ReconstructionStore):
    """Where a worker's attack puts what is finished, so that it can be sent home at once."""

    def __init__(self) -> None:
        self.finished: queue.SimpleQueue[Reconstruction | BaseException | None] = queue.SimpleQueue()

    def load(self, round: int, client: int) -> None:
        return None

    def write(self, r: Reconstruction) -> None:
        self.finished.put(r)


def solve(
    known: tuple[Attack, Knowledge], seen: Sequence[Observation], device: str, seed: int, seconds: float | None
) -> Iterator[list[Reconstruction]]:
    """In a worker: the attack on a piece, the reconstructions as they finish, those of some moments together."""
    attack, knowledge = known
    outlet = _Outlet()

    def work() -> None:
        try:
            attack(seen, knowledge, device=device, seed=seed, seconds=seconds, store=outlet)
            outlet.finished.put(None)
        except BaseException as error:
            outlet.finished.put(error)

    if device == "cpu":
        torch.set_num_threads(1)
    threading.Thread(target=work, daemon=True).start()
    going = True
    while going:
        some = [outlet.finished.get()]
        time.sleep(MOMENT)  # each message costs a core that others work on
        with suppress(queue.Empty):
            while True:
                some.append(outlet.finished.get_nowait())
        found = [one for one in some if isinstance(one, Reconstruction)]
        if found:
            yield found
        for one in some:
            if isinstance(one, BaseException):
                raise one
        going = some[-1] is not None
