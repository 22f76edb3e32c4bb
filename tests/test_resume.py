"""A run that was killed goes on from its last finished round, or from the last finished problem of its attack."""

import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fedleak.attacks.store import ReconstructionStore
from fedleak.cli import main
from fedleak.errors import UsageError
from fedleak.federation import client
from fedleak.federation.checkpoint import FILE, Checkpoint
from fedleak.federation.memory import Unstorable, recall, remember
from fedleak.files import alone, sweep
from fedleak.report.run_data import read_run

RUN = ["attack=idlg", "federation.clients=2", "federation.rounds=2", "federation.batch_size=1", "attack.restarts=1"]
RUN = [*RUN, "limit=off", "attack.max_evaluations=10"]


def tables(folder: Path) -> list[pd.DataFrame]:
    """Everything but seconds."""
    names = ("rounds.csv", "attacks.csv", "leakage.csv")
    return [pd.read_csv(folder / name).drop(columns="seconds", errors="ignore") for name in names]


def assert_same(folder: Path, other: Path) -> None:
    for a, b in zip(tables(folder), tables(other), strict=True):
        pd.testing.assert_frame_equal(a, b, check_exact=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["run", *RUN, f"output_dir={folder}"]) == 0
    assert not (folder / FILE).exists()
    return folder


def stop_at(monkeypatch, owner: object, name: str, number: int) -> None:
    """Interrupt the process as something is done for the `number`-th time."""
    before, count = getattr(owner, name), 0

    def stopping(*arguments, **options):
        nonlocal count
        count += 1
        if count == number:
            raise KeyboardInterrupt
        return before(*arguments, **options)

    monkeypatch.setattr(owner, name, stopping)


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """Page and pictures take longer than all the rest."""
    monkeypatch.setattr("fedleak.report.html.write_report", lambda folders, output: output)
    for picture in ("reconstructions_png", "evolution_png"):
        monkeypatch.setattr(f"fedleak.report.pictures.{picture}", lambda path, matches: None)


@pytest.mark.parametrize("moment", ["first round", "last round", "attack"])
def test_it_ends_with_the_tables_of_the_uninterrupted_run(whole, tmp_path, monkeypatch, moment):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        if moment == "attack":
            stop_at(patch, ReconstructionStore, "write", 4)
        else:
            stop_at(patch, client, "train_once", {"first round": 2, "last round": 4}[moment])
        assert main(["run", *RUN, f"output_dir={folder}"]) == 130
    assert not (folder / "summary.json").exists()
    for part in ("captures", "truth"):  # what a kill may leave half written
        for path in (folder / part).glob("round-*.shard"):
            (folder / part / f".{path.name}.4711").write_bytes(b"half")
    if moment != "attack":
        with (folder / "captures" / "index.jsonl").open("a") as file:
            file.write('{"round": 2, "cli')
    kept = sorted((folder / "captures" / "reconstructions").rglob("*.safetensors"))
    assert len(kept) == (3 if moment == "attack" else 0)
    times = [path.stat().st_mtime_ns for path in kept]

    assert main(["run", f"resume={folder}"]) == 0
    assert_same(folder, whole)
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert not list(folder.rglob(".*.4711"))
    assert not (folder / FILE).exists()


def test_a_finished_run_says_so_and_writes_its_tables_anew(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "attacks.csv").unlink()
    assert main(["run", f"resume={folder}"]) == 0
    assert "was finished; its tables are written anew" in capsys.readouterr().out
    assert_same(folder, whole)


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam"])
def test_strategies_remember(tmp_path, monkeypatch, strategy):
    run = ["run", "attack=none", "federation.clients=2", "federation.rounds=3", f"strategy={strategy}"]
    run = [*run, "federation.payload=weights", "capture=none" if strategy == "fedadam" else "capture=all"]
    assert main([*run, f"output_dir={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, client, "train_once", 5)
        assert main([*run, f"output_dir={tmp_path / 'run'}"]) == 130
    assert main(["run", f"resume={tmp_path / 'run'}"]) == 0
    for one in ("whole", "run"):
        assert len(pd.read_csv(tmp_path / one / "rounds.csv")) == 3
    pd.testing.assert_frame_equal(tables(tmp_path / "run")[0], tables(tmp_path / "whole")[0], check_exact=True)


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["run", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def test_what_cannot_be_gone_on_with_is_refused(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    assert "is of federation.lr=" in refused(capsys, f"resume={folder}", "federation.lr=0.5")
    assert "no run was begun there" in refused(capsys, f"resume={tmp_path}")
    assert "names another folder" in refused(capsys, f"resume={folder}", "output_dir=elsewhere")
    assert "takes no options" in refused(capsys, f"resume={folder}", "--multirun")
    (folder / "summary.json").unlink()
    assert f"no {FILE}" in refused(capsys, f"resume={folder}")
    with alone(folder):
        assert "another fedleak is at work there" in refused(capsys, f"resume={folder}")
    Checkpoint(2, {}, remember(object.__new__(type("S", (), {}))), 4, "else", 1.0).write(folder)
    assert "is of another configuration" in refused(capsys, f"resume={folder}")
    (folder / FILE).write_bytes(b"x" * 100)
    assert "damaged" in refused(capsys, f"resume={folder}")
    (folder / ".hydra" / "hydra.yaml").write_text("hydra: {job: 3}")
    assert "damaged" in refused(capsys, f"resume={folder}")


def test_rounds_that_were_altered_are_noticed(tmp_path, monkeypatch, capsys):
    folder, rounds = tmp_path / "run", tmp_path / "run" / "rounds.csv"
    with monkeypatch.context() as patch:
        stop_at(patch, ReconstructionStore, "write", 2)
        assert main(["run", *RUN, f"output_dir={folder}"]) == 130
    true = rounds.read_bytes()
    altered = true.replace(b"\n1,2,", b"\n1,1,")
    assert altered != true
    rounds.write_bytes(altered)
    assert "rounds.csv: altered since the run stopped" in refused(capsys, f"resume={folder}")
    rounds.write_bytes(true)
    assert main(["run", f"resume={folder}"]) == 0
    rounds.write_bytes(altered)
    assert "rounds.csv: altered since the run ended" in refused(capsys, f"resume={folder}")
    assert main(["attack", f"run_dir={folder}", "attack=labels_only"]) == 2
    assert "rounds.csv was altered since the run ended." in read_run(folder).problems
    rounds.write_bytes(true)
    assert main(["attack", f"run_dir={folder}", "attack=labels_only"]) == 0


def test_a_run_that_never_began_begins_where_it_was_meant_to(tmp_path):
    run = ["federation.clients=1", "federation.rounds=1", "attack=none", "capture=none"]
    assert main(["run", *run, f"resume={tmp_path / 'run'}"]) == 0
    assert len(pd.read_csv(tmp_path / "run" / "rounds.csv")) == 1


def test_a_sweep_goes_on_with_its_jobs(tmp_path, monkeypatch):
    run = ["run", "-m", "federation.lr=0.1,0.2", "federation.clients=1", "federation.rounds=2", "attack=none"]
    assert main([*run, f"output_dir={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, client, "train_once", 2)  # in the first job
        assert main([*run, f"output_dir={tmp_path / 'sweep'}"]) == 130
    assert main(["run", f"resume={tmp_path / 'sweep'}"]) == 0
    for job in ("0", "1"):
        a, b = (pd.read_csv(tmp_path / one / job / "rounds.csv").drop(columns="seconds") for one in ("sweep", "whole"))
        pd.testing.assert_frame_equal(a, b, check_exact=True)


class Inner:
    def __init__(self):
        self.velocity = None


class Thoughtful:
    """A strategy of one's own that remembers all sorts of things."""

    def __init__(self):
        self.inner, self.again = Inner(), self
        self.history, self.best, self.names = [], (0, None), set()
        self.random, self.numbers, self.draws = random.Random(1), np.random.default_rng(1), torch.Generator()
        self.function = max

    def learn(self):
        self.inner.velocity = {"w": np.ones((2, 3), np.float32)}
        self.history.append(np.float32(0.5))
        self.best, self.names = (3, torch.ones(2, dtype=torch.bfloat16)), {"a"}
        return self.random.random(), self.numbers.random(), torch.rand(1, generator=self.draws).item()


def test_a_memory_is_data_and_comes_back():
    one, other = Thoughtful(), Thoughtful()
    one.learn()
    memory = remember(one)
    drawn = one.learn()
    recall(other, memory)
    assert other.history == [0.5]
    assert type(other.history[0]) is np.float32
    assert other.inner.velocity["w"].sum() == 6
    assert (other.best[0], other.best[1].dtype, other.names, other.function) == (3, torch.bfloat16, {"a"}, max)
    assert other.learn() == drawn
    one.lock = iter([])
    with pytest.raises(Unstorable, match=r"strategy\.lock is a list_iterator"):
        remember(one)
    with pytest.raises(UsageError, match="does not fit it"):
        recall(Inner(), memory)


def test_temporary_files_are_swept_and_no_others(tmp_path):
    for name in (".rounds.csv.12", ".hidden", "a.12", ".note.txt"):
        (tmp_path / name).write_text("")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", ".note.txt", "a.12"]


def in_a_child(arguments: list[str]) -> multiprocessing.Process:
    """`main` in a process of its own that need not import anything again, so that every moment is one of work."""
    child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(main(arguments)))
    child.start()
    return child


def checkpointed(child: multiprocessing.Process, folder: Path) -> float:
    """Wait until a run has its first checkpoint; the moment."""
    while child.is_alive() and not (folder / FILE).exists():
        time.sleep(0.002)
    return time.perf_counter()


KILLED = [*RUN, "federation.rounds=5"]
"""Long enough for kills among its rounds, its attack and its tables."""


@pytest.mark.slow
def test_fifty_kills_at_random_moments_after_the_first_checkpoint(tmp_path, capfd):
    whole, draw, stages = tmp_path / "whole", random.Random(0), Counter()
    child = in_a_child(["run", *KILLED, f"output_dir={whole}"])
    began = checkpointed(child, whole)
    child.join()
    length = time.perf_counter() - began
    for number in range(int(os.environ.get("FEDLEAK_KILLS", "50"))):
        folder, moment = tmp_path / str(number), draw.uniform(0, length)
        child = in_a_child(["run", *KILLED, f"output_dir={folder}"])
        checkpointed(child, folder)
        child.join(moment)
        child.kill()
        child.join()
        stage = next(s for s, name in STAGES.items() if (folder / name).exists())
        child = in_a_child(["run", *KILLED, f"resume={folder}"])
        child.join(600)
        try:
            assert child.exitcode == 0, f"exit code {child.exitcode}"
            assert_same(folder, whole)
            assert not [path for path in folder.rglob(".*") if path.name != ".hydra"]
            stages[stage] += 1
        except (AssertionError, OSError) as error:
            with capfd.disabled():
                print(
                    f"\nkilled {moment:.2f} of {length:.2f} s after the first checkpoint ({stage}): {error}", flush=True
                )
        shutil.rmtree(folder, ignore_errors=True)
    with capfd.disabled():
        right = sum(stages.values())
        print(f"\n{right} of {number + 1} killed runs ended with the uninterrupted tables: {dict(stages)}")
    assert right == number + 1


STAGES = {
    "when it was finished": "summary.json",
    "among its tables": "attacks.csv",
    "in the attack": "captures/reconstructions",
    "among its rounds": FILE,
}
