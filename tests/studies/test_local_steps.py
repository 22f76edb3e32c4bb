"""The study of local steps: a row a client and attack, and a control that must score like a guess."""

from pathlib import Path

import pandas as pd
import pytest

from fedleak.errors import UsageError
from fedleak.setup import compose
from fedleak.studies import Job, LocalSteps

CLIENTS = {"2 x 1": ["federation.local_steps=2", "federation.batch_size=1", "federation.lr=0.1"]}
ATTACKS = {"unrolled": ["attack=fedavg", "attack.max_evaluations=50"]}


def job(folder: Path) -> Job:
    return Job(compose(["data=digits"]), ["data=digits"], folder)


def test_it_runs_on_the_digits(tmp_path: Path):
    study = LocalSteps(CLIENTS, ATTACKS, networks=2, fewer={"unrolled": 1}, largest={"unrolled": 2})
    study.check(job(tmp_path))
    study.run(job(tmp_path))
    summary = pd.read_csv(tmp_path / "summary.csv").set_index("client")
    assert list(summary.index) == ["2 x 1", "noise"]
    assert summary.loc["2 x 1", "median_mse"] < 0.8 * summary.loc["noise", "median_mse"]
    assert summary.loc["noise", "recovered"] == 0
    assert (summary["networks"] == 1).all()
    assert (tmp_path / "recovered.png").stat().st_size > 0


def test_a_client_that_no_attack_takes_is_refused(tmp_path: Path):
    adam = {"adam": [*CLIENTS["2 x 1"], "federation.optimizer=adam"]}
    LocalSteps(adam, ATTACKS | {"surrogate": ["attack=surrogate"]}, networks=1).check(job(tmp_path))
    with pytest.raises(UsageError, match="after Adam"):
        LocalSteps(adam, {"surrogate": ["attack=surrogate"]}, networks=1).check(job(tmp_path))


def test_impossible_settings_are_refused():
    for name, value in (("networks", 0), ("order", "guessed"), ("limits", -1)):
        with pytest.raises(UsageError, match=rf"study\.{name}"):
            LocalSteps(**{"clients": {}, "attacks": {}, "networks": 1, name: value})

    for name in ("fewer", "largest"):
        with pytest.raises(UsageError, match=rf"study\.{name}\.mapp: no such attack here; known: unrolled"):
            LocalSteps(CLIENTS, ATTACKS, 1, **{name: {"mapp": 1}})


def test_attacks_that_take_too_long_on_large_updates_are_left_out(tmp_path: Path):
    few = LocalSteps(CLIENTS, ATTACKS | {"again": ATTACKS["unrolled"]}, networks=1, largest={"again": 1})
    assert few._fitting(job(tmp_path), "2 x 1") == ["unrolled"]
