from dataclasses import replace

import pandas as pd
import pytest
import torch

from fedleak.attacks.store import ReconstructionStore
from fedleak.errors import UsageError
from fedleak.setup import compose
from fedleak.studies import FirstDefenses, Job
from fedleak.studies.first_defenses import PureNoise

SETTINGS = {
    "attacks": {"idlg": ["attack=idlg", "attack.restarts=1", "attack.max_evaluations=150"]},
    "gaussian": [0.5],
    "laplacian": [0.0001],
    "pruning": [0.9],
    "victims": 3,
    "leak_data": "digits",
    "utility_data": "digits",
    "roots": {"digits": None},
    "rounds": 2,
    "seeds": 1,
}


def job(folder) -> Job:
    overrides = ["federation.clients=2"]
    return Job(compose(overrides), overrides, folder)


def test_what_stops_the_leak_and_what_it_costs(tmp_path):
    study = FirstDefenses(**SETTINGS)
    study.check(job(tmp_path))
    study.run(job(tmp_path))
    summary = pd.read_csv(tmp_path / "summary.csv", keep_default_na=False, na_values=[""])
    assert list(summary.defense) == ["guess", "none", "gaussian", "laplacian", "pruning", "pure noise"]
    rows = summary.set_index("defense")
    assert rows.recovered["none"] > 0.6
    assert rows.recovered["laplacian"] > 0.6, "noise far below the gradient stops nothing"
    assert rows.recovered[["guess", "gaussian", "pruning", "pure noise"]].eq(0).all()
    assert rows.mse["pure noise"] > 0.5 * rows.mse["guess"], "nothing comes out of noise"
    assert rows.label_accuracy["none"] == 1
    assert rows.change["none"] == 0 < rows.change["laplacian"] < rows.change["gaussian"]
    assert 1 < rows.change["pure noise"] < 2
    assert rows.test_accuracy[["none", "gaussian", "laplacian", "pruning"]].notna().all()
    assert rows.test_accuracy[["guess", "pure noise"]].isna().all()
    results = pd.read_csv(tmp_path / "results.csv")
    assert len(results) == 3 + 3 * 5
    for picture in ("first_defenses", "idlg"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 5_000


def test_equal_numbers_mean_equal_noise(tmp_path):
    study = FirstDefenses(**{**SETTINGS, "gaussian": [0.01], "laplacian": [0.01]})
    defenses = {name: defense for name, _, defense in study._defenses()}
    zero = {"weight": torch.zeros(200_000)}
    for name in ("gaussian", "laplacian"):
        noise = defenses[name].apply(zero, generator=torch.Generator().manual_seed(0))["weight"]
        assert float(noise.std()) == pytest.approx(0.01, rel=0.02)
    cells = study._cells(job(tmp_path))
    assert "defense.scale=0.00707" in " ".join(cells["laplacian 0.01 seed-0"])


def test_the_control_keeps_sizes_and_nothing_else():
    torch.manual_seed(0)
    update = {"weight": torch.randn(100, 100) * 3, "bias": torch.full((1000,), 0.5)}
    noise = PureNoise().apply(update, generator=torch.Generator().manual_seed(1))
    for name, value in update.items():
        assert float(noise[name].norm() / value.norm()) == pytest.approx(1, rel=0.1)
        assert abs(float((noise[name] * value).mean() / value.square().mean())) < 0.1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"gaussian": [-0.1]}, r"study\.gaussian=\[-0\.1\]: must be a list of numbers above 0"),
        ({"pruning": [1.0]}, r"study\.pruning=1\.0: must be below 1"),
        ({"victims": 0}, r"study\.victims=0: must be a whole number from 1"),
        ({"leak_data": "cifar", "roots": {}}, r"cifar: no such choice of data"),
        ({"attacks": {"idle": ["attack=none"]}}, r"study\.attacks\.idle: attacks nothing"),
        ({"utility_data": "mnist", "roots": {"mnist": "/no/such"}}, r"data\.root=/no/such"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(tmp_path, setting, message):
    with pytest.raises(UsageError, match=message):
        FirstDefenses(**{**SETTINGS, **setting}).check(job(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_killed_study_rebuilds_no_image_twice(tmp_path, monkeypatch):
    study = FirstDefenses(
        **{**SETTINGS, "attacks": {"idlg": [*SETTINGS["attacks"]["idlg"][:2], "attack.max_evaluations=5"]}}
    )
    study.run(job(tmp_path / "whole"))
    write, written = ReconstructionStore.write, []

    def interrupted(self, one):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(one)
        write(self, one)

    with monkeypatch.context() as patch:
        patch.setattr(ReconstructionStore, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            study.run(job(tmp_path / "run"))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("round-*.safetensors")}
    assert len(kept) == 4
    study.run(replace(job(tmp_path / "run"), resume=True))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name in ("results.csv", "utility.csv", "summary.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
