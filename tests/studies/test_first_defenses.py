from dataclasses import replace

import pandas as pd
import pytest
import torch

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
    defenses = {name: defense for name, _, defense in study._defenses(job(tmp_path))}
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


def test_who_is_told_gets_through_and_the_limit_stands_beside(tmp_path):
    told = ["attack=map", "attack.restarts=1", "attack.adaptive=true", "threat.defense=true"]
    changed = {"attacks": {"map": [*told, "threat.auxiliary_data=true"]}, "gaussian": [0.001], "pruning": [0.7]}
    changed |= {"formats": ["int8"], "image_size": 12, "limits": 1, "victims": 1, "rounds": None}
    study = FirstDefenses(**{**SETTINGS, **changed})
    study.check(job(tmp_path))
    study.run(job(tmp_path))
    summary = pd.read_csv(tmp_path / "summary.csv", keep_default_na=False, na_values=[""]).set_index("defense")
    first = (tmp_path / "results.csv").read_text()
    (tmp_path / "images" / "map-int8-1.npy").unlink()  # as if killed before
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    study.run(replace(job(tmp_path), resume=True))
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    assert [path.name for path in after if after[path] != before.get(path)] == ["map-int8-1.npy"]
    assert (tmp_path / "results.csv").read_text() == first
    assert summary.test_accuracy.isna().all()
    published = {"laplacian": "no", "int8": "yes", "pruning": "yes"}
    assert summary.published[list(published)].to_dict() == published
    ours = summary.loc[["none", "gaussian", "pruning", "int8"]]
    assert ours.recovered.eq(1).all()
    assert ours.limit_mse.between(ours.mse / 30, ours.mse * 30).all()
    assert summary.loc[["guess", "pure noise"], "limit_mse"].isna().all()
    assert summary.loc["none", "limit_mse"] < summary.loc["int8", "limit_mse"] < summary.loc["gaussian", "limit_mse"]


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"study.formats=int9: no such choice of defense"):
        FirstDefenses(**{**SETTINGS, "formats": ["int9"]}).check(job(tmp_path))
