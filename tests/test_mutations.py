"""Mutated files and replies: one clear line or the same tables, no traceback, no changed table without a word."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fedleak
from fedleak import pipeline
from fedleak.attacks import Attack, Knowledge, LabelsOnly
from fedleak.attacks.labels import Version1
from fedleak.capture_index import digest
from fedleak.cli import main
from fedleak.console import Console
from fedleak.errors import FedleakError
from fedleak.federation.engine import LocalEngine
from fedleak.federation.records import to_arrays, to_tensors
from fedleak.federation.strategy import Repeatable
from fedleak.setup import compose

RUN = ["attack=idlg", "federation.clients=2", "federation.rounds=2", "federation.batch_size=1", "limit=off"]
RUN = [*RUN, "attack.restarts=1", "attack.max_evaluations=5"]
OPTIONS = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
OPTIONS |= {"phases": [Phase.generate]}


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    folder = tmp_path_factory.mktemp("victim") / "run"
    assert main(["run", *RUN, f"output_dir={folder}"]) == 0
    return folder


@st.composite
def mutations(draw: st.DrawFn) -> tuple[float, str, float, float, bytes]:
    """(which file, what is done to it, where, how much, with which bytes)."""
    kind = draw(st.sampled_from([*BYTES, *WHOLE, "forged", "lines", "json"]))
    share = st.floats(0, 1, exclude_max=True)
    return draw(share), kind, draw(share), draw(share), draw(st.binary(min_size=1, max_size=9))


BYTES = {
    "flip": lambda data, at, size, new: data[:at] + bytes([data[at] ^ (1 << (new[0] % 8))]) + data[at + 1 :],
    "overwrite": lambda data, at, size, new: data[:at] + new + data[at + len(new) :],
    "insert": lambda data, at, size, new: data[:at] + new + data[at:],
    "cut": lambda data, at, size, new: data[:at],
    "take out": lambda data, at, size, new: data[:at] + data[at + size :],
    "double": lambda data, at, size, new: data[: at + size] + data[at:],
    "zero": lambda data, at, size, new: data[:at] + bytes(size) + data[at + size :],
    "append": lambda data, at, size, new: data + new,
}
WHOLE = ("missing", "empty", "another's", "twice")


def mutated(files: list[Path], mutation: tuple[float, str, float, float, bytes]) -> tuple[Path, bytes | None]:
    """A file and its new content, None for removing it."""
    which, kind, at, much, new = mutation
    path = files[int(which * len(files))]
    if kind in ("forged", "lines"):
        path = next(p for p in files if p.name == "index.jsonl")
    if kind == "json":
        path = next(p for p in files if p.name == "info.json")
    data = path.read_bytes()
    place = int(at * len(data))
    if kind in BYTES:
        return path, BYTES[kind](data, place, int(much * 60) + 1, new)
    if kind in WHOLE:
        alike = [p for p in files if p.suffix == path.suffix]
        other = alike[int(at * len(alike))].read_bytes()
        return path, {"missing": None, "empty": b"", "another's": other, "twice": data + data}[kind]
    value = [-1, 10**9, None, "x", [], {}, 1.5, float("nan"), True, "../x"][new[0] % 10]
    if kind == "json":
        said = json.loads(data)
        said[sorted(said)[int(much * len(said))]] = value
        if new[-1] % 2:
            said["sha256"] = digest({k: v for k, v in said.items() if k not in ("format", "sha256")})
        return path, json.dumps(said).encode()
    lines = data.splitlines(keepends=True)
    chosen = int(at * len(lines))
    if kind == "lines":
        other = int(much * len(lines))
        kept = [lines[:chosen] + lines[chosen + 1 :], [*lines, lines[chosen]], lines[::-1], lines[:other]][new[0] % 4]
        return path, b"".join(kept)
    row = json.loads(lines[chosen])
    row[sorted(row)[int(much * len(row))]] = value
    row["check"] = digest({k: v for k, v in row.items() if k != "check"})
    lines[chosen] = json.dumps(row).encode() + b"\n"
    return path, b"".join(lines)


def tables(outcome_folder: Path) -> list[pd.DataFrame]:
    return [
        pd.read_csv(outcome_folder / name).drop(columns="seconds", errors="ignore")
        for name in ("attacks.csv", "leakage.csv")
    ]


def attack_mutated(victim: Path, tmp_path: Path, caplog, count: int) -> tuple[Counter[str], list[str]]:
    """What came of attacking the run again after each of `count` mutations: a count a kind, and what is wrong."""
    setup, before = compose(RUN), tables(victim)
    files = [p for part in ("captures", "truth") for p in sorted((victim / part).rglob("*")) if p.is_file()]
    files += [victim / "rounds.csv"]
    outcomes, wrong = Counter[str](), []

    @settings(max_examples=count, **OPTIONS)
    @given(mutations())
    def each(mutation):
        path, data = mutated(files, mutation)
        original, began = path.read_bytes(), time.process_time()
        caplog.clear()
        try:
            path.unlink() if data is None else path.write_bytes(data)
            pipeline.attack_again(setup, victim, tmp_path / "again", Console(quiet=True))
            same = all(a.equals(b) for a, b in zip(before, tables(tmp_path / "again"), strict=True))
            warned = any(record.levelno >= logging.WARNING for record in caplog.records)
            what = "the same tables" if same else "other tables, and said" if warned else "changed without a word"
        except FedleakError as error:
            what = "refused" if str(error).count("\n") == 0 else "not one line"
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
        finally:
            path.write_bytes(original)
        if time.process_time() - began > 10:
            what = "hung"
        outcomes[what] += 1
        if what not in ("the same tables", "refused", "other tables, and said"):
            wrong.append(f"{path.relative_to(victim)} {mutation[1:]}: {what}")

    each()
    return outcomes, wrong


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    for picture in ("reconstructions_png", "evolution_png"):
        monkeypatch.setattr(f"fedleak.report.pictures.{picture}", lambda path, matches: None)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)
    )


START = {name: value for name, value in model().state_dict().items() if value.is_floating_point()}
BUFFERS = [name for name, _ in model().named_buffers() if "num" not in name]

NUMBERS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(), st.sampled_from([0, -1, 1, 10**9, 10**15, 1e308]))
WORDS = st.one_of(NUMBERS, st.text(max_size=8), st.booleans(), st.binary(max_size=4), st.lists(NUMBERS, max_size=3))
KEYS = st.sampled_from(
    ["num-examples", "train_loss", "partition-id", "lr", "local-steps", "labels", "proximal-mu", "x"]
)


@st.composite
def arrays(draw: st.DrawFn) -> ArrayRecord:
    """An update with something wrong, or not."""
    values = {name: value.numpy().copy() for name, value in START.items()}
    for _ in range(draw(st.integers(0, 2))):
        name, how = draw(st.sampled_from(sorted(values))), draw(st.integers(0, 7))
        value = values[name]
        if how == 0:
            values[name] = value.astype(draw(st.sampled_from(["f8", "f2", "i4", "c8", "?", "u1"])))
        elif how == 1:
            values[name] = np.resize(value, draw(st.lists(st.integers(0, 5), max_size=5)))
        elif how == 2 and value.size:
            value.flat[0] = draw(st.floats(width=32))
        elif how == 3 and len(values) > 1:
            del values[name]
        elif how == 4:
            values[draw(st.text(max_size=5)) or "x"] = value
        elif how == 5:
            values = dict(reversed(values.items()))
    record = ArrayRecord({name: Array(value) for name, value in values.items()})
    if draw(st.integers(0, 5)) == 0:  # bytes that are no array
        name = draw(st.sampled_from(sorted(record)))
        record[name] = Array(
            dtype="float32", shape=(1,), stype=draw(st.text(max_size=6)), data=draw(st.binary(max_size=90))
        )
    return record


@st.composite
def replies(draw: st.DrawFn) -> RecordDict:
    """What a hostile client says."""
    records = {}
    for name in draw(st.lists(st.sampled_from(["arrays", "metrics", "client", "more", "config"]), max_size=5)):
        said = draw(st.dictionaries(KEYS, WORDS, max_size=3))
        try:
            records[name] = (
                draw(arrays())
                if name in ("arrays", "more")
                else (
                    MetricRecord({"num-examples": 4, "train_loss": 1.0} | said)
                    if name == "metrics"
                    else ConfigRecord(said)
                )
            )
        except (TypeError, ValueError):  # no record holds such a thing
            records[name] = ConfigRecord({})
    return RecordDict(records)


def federate(folder: Path, said: RecordDict) -> list:
    """A federation of three in which node 0 says `said`; returns what was captured."""
    app, server = ClientApp(), ServerApp()
    whole = to_arrays(START)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        number = ConfigRecord({"partition-id": int(context.node_config["partition-id"])})
        return Message(RecordDict({"client": number}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        trained = to_arrays({name: value + 0.01 for name, value in to_tensors(message.content["arrays"]).items()})
        metrics = MetricRecord({"num-examples": 4, "train_loss": 1.0})
        honest = RecordDict({"arrays": trained, "metrics": metrics, "client": ConfigRecord({"partition-id": number})})
        return Message(said if number == 0 else honest, reply_to=message)

    @server.main()
    def main(grid, context):
        inner = Repeatable(FedAvg(), clients=3, fraction=1.0, seed=0, buffers=BUFFERS, most_examples=100)
        threat = fedleak.ThreatModel(labels=True)
        known = {"classes": 2, "lr": 0.1, "client_of": inner.partition_of.get}
        eavesdropper = fedleak.Eavesdropper(inner, folder, model=model(), threat=threat, quiet=True, **known)
        eavesdropper.start(grid, whole, num_rounds=2)

    LocalEngine().run(server, app, 3)
    return fedleak.CaptureStore.open(folder).load()


def hear_replies(tmp_path: Path, count: int) -> list[str]:
    """What is wrong with how `count` hostile replies are taken."""
    attack, knowledge = Attack(Version1(), LabelsOnly()), Knowledge(model(), (1, 2, 2), 2)
    wrong, number = [], 0

    @settings(max_examples=count, **OPTIONS)
    @given(replies())
    def each(said):
        nonlocal number
        number, began = number + 1, time.process_time()
        folder = tmp_path / str(number)
        try:
            seen = federate(folder, said)
            assert len(seen) == 6
            assert not [o.error for o in seen if o.client != 0 and o.error and len({p.client for p in seen}) == 3]
            found = attack(seen, knowledge)
            assert len(found) == 6
            assert sum(len(one.labels) == 4 for one in found) >= 4
        except Exception as error:
            wrong.append(f"{said}: {type(error).__name__}: {error}"[:400])
        if time.process_time() - began > 5:
            wrong.append(f"{said}: hung"[:400])
        shutil.rmtree(folder, ignore_errors=True)

    each()
    return wrong


def test_some_mutated_files(victim, tmp_path, caplog):
    outcomes, wrong = attack_mutated(victim, tmp_path, caplog, 40)
    assert not wrong, "\n".join(wrong)
    assert outcomes["refused"] > 10


def test_some_hostile_replies(tmp_path):
    wrong = hear_replies(tmp_path, 30)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_ten_thousand_mutated_files_and_replies(victim, tmp_path, caplog, capsys):
    logging.getLogger("fedleak").handlers.clear()
    count = int(os.environ.get("FEDLEAK_CASES", "10000"))
    outcomes, wrong = attack_mutated(victim, tmp_path, caplog, count * 7 // 10)
    replies_wrong = hear_replies(tmp_path, count * 3 // 10)
    with capsys.disabled():
        print(f"\n{sum(outcomes.values())} mutated files: {dict(outcomes.most_common(12))}")
        print(f"{count * 3 // 10} hostile replies, {len(replies_wrong)} of them taken amiss")
        for one in [*wrong[:60], *replies_wrong[:60]]:
            print(f"  {one}")
    assert not wrong + replies_wrong
