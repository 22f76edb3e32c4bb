"""attack.executor=ray: the same reconstructions as in this process, in pieces, whichever finishes first."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import types
from dataclasses import replace
from importlib.machinery import ModuleSpec

import pandas as pd
import pytest
import torch

from fedleak.attacks import Attack, Knowledge, LabelsOnly
from fedleak.attacks.labels import Version1
from fedleak.attacks.store import ReconstructionStore
from fedleak.cli import main
from fedleak.errors import UsageError
from fedleak.executor import PIECE, attack_on_ray, find_modules, pieces
from fedleak.models import LeNet
from fedleak.setup import compose

SMALL = ["federation.clients=3", "federation.rounds=2", "federation.batch_size=1", "limit=off", "attack.restarts=1"]


class TaskError(Exception):
    """What Ray makes of an error in a worker."""

    def __init__(self, cause):
        super().__init__(f"\x1b[36mremote traceback\n{cause}")
        self.cause = cause


@pytest.fixture
def cluster(monkeypatch):
    """Ray as far as it is used, in this process: the last piece finishes first; it notes what each was given."""
    ray = types.ModuleType("ray")
    ray.exceptions = types.SimpleNamespace(RayTaskError=TaskError)
    ray.calls, ray.started = [], 0

    def remote(**needs):
        def make(function):
            def call(known, seen, *rest):
                ray.calls.append((needs, [(o.round, o.client) for o in seen]))
                return iter(function(known, seen, *rest))

            return types.SimpleNamespace(remote=call)

        return make

    def get(value):
        if isinstance(value, Exception):
            raise TaskError(value)
        return value

    def wait(waiting, num_returns):
        return [Guarded(waiting[-1])], waiting[:-1]

    class Guarded:
        def __init__(self, inner):
            self.inner = inner

        def __next__(self):
            try:
                return next(self.inner)
            except UsageError as error:
                return error

        def __eq__(self, other):
            return self.inner is other

    ray.remote, ray.get, ray.wait, ray.put = remote, get, wait, lambda value: value
    ray.is_initialized = lambda: ray.started > 0
    ray.init = lambda **settings: setattr(ray, "started", 1)
    ray.shutdown = lambda: setattr(ray, "started", 0)
    ray.cluster_resources = lambda: {"CPU": 2.0}
    ray.__spec__ = ModuleSpec("ray", None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


def tables(folder):
    return [
        pd.read_csv(folder / name).drop(columns="seconds", errors="ignore") for name in ("attacks.csv", "leakage.csv")
    ]


@pytest.fixture
def both(tmp_path):
    """Run the same twice: here, and on Ray; the tables must agree in all but seconds."""

    def run(*overrides):
        for executor in ("local", "ray"):
            out = f"output_dir={tmp_path / executor}"
            assert main(["run", *SMALL, *overrides, f"attack.executor={executor}", out]) == 0
        for one, other in zip(tables(tmp_path / "local"), tables(tmp_path / "ray"), strict=True):
            pd.testing.assert_frame_equal(one, other)

    return run


def test_pieces_give_the_same_reconstructions(observe, cluster, tmp_path):
    seen = [replace(observe(1, seed=client)[0], client=client) for client in range(5)]
    broken = replace(seen[3], error="client error: gone")
    here, there = solved([*seen[:3], broken, seen[4]], ["attack=idlg"], tmp_path)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.images, other.images)
        assert (one.client, one.evaluations, one.stop_reason) == (other.client, other.evaluations, other.stop_reason)
    assert [needs for needs, _ in cluster.calls] == [{"num_cpus": 1, "num_gpus": 0}] * 2
    assert [place for _, places in cluster.calls for place in places] == [(1, 0), (1, 1), (1, 2), (1, 4)]
    assert not cluster.started  # what was started is ended


def test_a_clients_rounds_stay_together(observe, cluster, tmp_path):
    seen = [replace(observe(1, seed=c)[0], round=r, client=c) for r in (1, 2) for c in range(3)]
    here, there = solved(seen, ["attack=joint", "attack/labels=idlg"], tmp_path)
    assert max(float((a.images - b.images).abs().max()) for a, b in zip(here, there, strict=True)) < 1e-4
    for _, places in cluster.calls:
        assert {r for r, _ in places} == {1, 2}


def solved(seen, overrides, folder):
    """By the attack itself, and on the cluster."""
    attack = compose([*overrides, "attack.restarts=1", "attack.max_evaluations=4"]).attack.build()
    known = Knowledge(LeNet((1, 28, 28), 10), (1, 28, 28), 10)
    settings = {"device": torch.device("cpu"), "seed": 0, "seconds": None}
    told = []
    there = attack_on_ray(attack, seen, known, store=ReconstructionStore(folder), on_progress=told.append, **settings)
    assert told[-1].done == told[-1].problems == sum(o.error is None for o in seen)
    return attack(seen, known, **settings), there


@pytest.mark.slow
def test_a_real_cluster_gives_the_same_tables(both):
    both("attack=idlg", "attack.max_evaluations=30")


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_two_workers_against_one_on_512_victims(observe, tmp_path, capfd):
    """Wall time, so nothing else should run; Ray's own start is not counted, that of its workers is."""
    import ray

    find_modules()
    seen = [replace(observe(1, seed=client)[0], client=client) for client in range(512)]
    attack = compose(["attack=idlg", "attack.restarts=1", "attack.max_evaluations=120"]).attack.build()
    known, seconds = Knowledge(LeNet((1, 28, 28), 10), (1, 28, 28), 10), {}
    for workers in (1, 2):
        ray.init(num_cpus=workers, log_to_driver=False, include_dashboard=False)
        try:
            began, store = time.perf_counter(), ReconstructionStore(tmp_path / str(workers))
            attack_on_ray(attack, seen, known, store=store, device=torch.device("cpu"), seed=0, seconds=None)
            seconds[workers] = time.perf_counter() - began
        finally:
            ray.shutdown()
    with capfd.disabled():
        print(f"\n512 victims, one worker: {seconds[1]:.1f} s; two: {seconds[2]:.1f} s, {seconds[1] / seconds[2]:.2f}×")
    for one, other in zip(*(ReconstructionStore(tmp_path / str(workers)) for workers in (1, 2)), strict=True):
        assert torch.equal(one.images, other.images)
    assert seconds[1] > 1.3 * seconds[2]


def test_many_updates_are_cut_alike_for_any_number_of_workers(observe):
    seen = [observe(1)[0]] * 512
    few, many = (pieces(seen, range(512), workers, whole_clients=False) for workers in (1, 8))
    assert few == many
    assert max(map(len, few)) == PIECE
    assert [len(piece) for piece in pieces(seen, range(10), 4, whole_clients=False)] == [3, 3, 3, 1]
    assert pieces(seen, [], 4, whole_clients=False) == []


def attack_one(observation, folder, threat=None):
    attack = Attack(Version1(), LabelsOnly())
    settings = {"device": torch.device("cpu"), "seed": 0, "seconds": None, "store": ReconstructionStore(folder)}
    return attack_on_ray(attack, [observation], Knowledge(LeNet((1, 28, 28), 10), (1, 28, 28), 10), **settings)


def test_what_a_worker_refuses_is_said_in_its_own_words(observe, cluster, tmp_path):
    seen, _, _ = observe(1)
    broken = {name: value for name, value in seen.update.items() if name != "fc.weight"}
    with pytest.raises(UsageError) as error:
        attack_one(type(seen)(1, 0, seen.parameters, broken, seen.training), tmp_path)
    assert "remote traceback" not in str(error.value)
    assert not cluster.started


def test_what_is_finished_starts_no_cluster(observe, cluster, tmp_path):
    seen, _, labels = observe(1)
    (first,) = attack_one(seen, tmp_path)
    cluster.calls.clear()
    (again,) = attack_one(seen, tmp_path)
    assert first.labels.tolist() == again.labels.tolist() == labels.tolist()
    assert not cluster.calls


def test_without_ray_it_is_refused_before_anything_runs(monkeypatch, tmp_path, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *of: None if name == "ray" else there(name, *of))
    assert main(["run", *SMALL, "attack=idlg", "attack.executor=ray", f"output_dir={tmp_path / 'run'}"]) == 2
    assert "attack.executor=ray: Ray is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
