"""Trackers are told what the tables say; what is missing is refused before any work."""

import sqlite3
import sys
from pathlib import Path

import pandas as pd
import pytest

from fedleak.cli import main
from fedleak.errors import UsageError
from fedleak.instantiate import Part
from fedleak.tracking import MLflow, NoTracker, TensorBoard, Tracker, finite

SHORT = ["attack=idlg", "federation.clients=2", "federation.rounds=2", "federation.batch_size=1", "attack.restarts=2"]
SHORT = [*SHORT, "limit=off"]


class Diary(Tracker):
    """Writes everything down, and survives being made anew."""

    told: list[tuple] = []  # noqa: RUF012

    def __init__(self, fail_at: str = "") -> None:
        self.fail_at = fail_at

    def start(self, folder, settings):
        self.told.append(("start", folder, dict(settings)))

    def log(self, round, metrics):
        self.told.append(("log", round, dict(metrics)))

    def keep(self, path):
        assert path.is_file()
        if path.name == self.fail_at:
            raise RuntimeError("the disk is full")
        self.told.append(("keep", path.name))

    def finish(self, summary):
        self.told.append(("finish", None if summary is None else dict(summary)))


@pytest.fixture
def diary(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_tracker", type(sys)("my_tracker"))
    sys.modules["my_tracker"].Diary = Diary  # type: ignore[attr-defined]
    monkeypatch.setattr(Diary, "told", [])
    return Diary.told


MINE = ["tracking._target_=my_tracker.Diary"]


def test_a_tracker_of_ones_own_hears_of_the_run_and_of_an_attack_on_it(diary, tmp_path):
    folder = tmp_path / "run"
    assert main(["run", *SHORT, *MINE, f"output_dir={folder}"]) == 0
    kind, where, settings = diary[0]
    assert (kind, where) == ("start", folder)
    assert settings["federation.clients"] == "2"
    assert settings["model"] == "LeNet"
    rounds, leakage = pd.read_csv(folder / "rounds.csv"), pd.read_csv(folder / "leakage.csv")
    logged = [entry[1:] for entry in diary if entry[0] == "log"]
    assert [number for number, _ in logged] == [1, 2, 1, 2]
    for number, metrics in logged[:2]:
        assert metrics["federation/test_accuracy"] == pytest.approx(rounds.test_accuracy[number - 1])
        assert metrics["federation/train_loss"] == pytest.approx(rounds.train_loss[number - 1])
    for number, metrics in logged[2:]:
        of_round = leakage[leakage["round"] == number]
        assert metrics["leakage/recovered"] == of_round.recovered.mean()
        assert metrics["leakage/median_psnr"] == pytest.approx(of_round.psnr.median())
        assert metrics["leakage/label_accuracy"] == 1
    kept = [entry[1] for entry in diary if entry[0] == "keep"]
    assert {"reconstructions.png", "evolution.png", "rounds.csv", "leakage.csv", "summary.json", "report.html"} <= {
        *kept
    }
    assert diary[-1][0] == "finish"
    assert diary[-1][1]["recovered"] == leakage.recovered.sum()

    diary.clear()
    assert main(["attack", f"run_dir={folder}", "attack=labels_only", *MINE]) == 0
    assert diary[0][:2] == ("start", folder / "attacks" / "labels_only")
    assert [entry[1] for entry in diary if entry[0] == "log"] == [1, 2]
    assert diary[-1][0] == "finish"


def test_a_failed_run_is_said_to_have_failed(diary, tmp_path):
    overrides = [*SHORT, *MINE, "+tracking.fail_at=report.html", f"output_dir={tmp_path / 'run'}"]
    # Hydra shows the traceback, which is the tracker's author's to see; under coverage, a debugger to it, it raises.
    with pytest.raises((SystemExit, RuntimeError)):
        main(["run", *overrides])
    assert diary[-1] == ("finish", None)
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(("choice", "module"), [("tensorboard", "tensorboard"), ("mlflow", "mlflow")])
def test_a_missing_package_is_named_before_any_work(choice, module, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    folder = tmp_path / "run"
    assert main(["run", *SHORT, f"tracking={choice}", f"output_dir={folder}"]) == 2
    said = capsys.readouterr().err
    assert f"tracking={choice}: the package {module} is not installed; pip install {module}" in said
    assert not folder.exists()


def test_only_trackers_and_local_databases(tmp_path):
    with pytest.raises(UsageError, match=r"gives no Tracker; name a subclass of fedleak\.tracking\.Tracker"):
        Part("tracking", {"_target_": "collections.OrderedDict"}).build(Tracker)
    assert isinstance(Part("tracking", {"_target_": "fedleak.tracking.NoTracker"}).build(Tracker), NoTracker)
    for uri in ("http://example.org", "databricks", "./mlruns"):
        with pytest.raises(UsageError, match=r"tracking\.uri=.*sqlite:///"):
            Part("tracking", {"_target_": "fedleak.tracking.MLflow", "uri": uri}).build(Tracker)


def test_only_finite_numbers_are_logged():
    values = {"a": 1, "b": 0.5, "c": float("nan"), "d": float("inf"), "e": None, "f": "x", "g": True}
    assert finite(values, "z/") == {"z/a": 1, "z/b": 0.5}


def use(tracker: Tracker, folder: Path, picture: Path) -> None:
    folder.mkdir(exist_ok=True)
    tracker.start(folder, {"attack.name": "dlg", "long": "x" * 9000, **{f"k.{i}": "v" for i in range(150)}})
    for number in (1, 2, 3):
        tracker.log(number, {"federation/test_accuracy": number / 4})
    tracker.log(2, {"leakage/recovered": 0.5})
    tracker.keep(picture)
    tracker.finish({"recovered": 4.0})


@pytest.fixture
def picture(small_run) -> Path:
    return small_run / "reconstructions.png"


def test_tensorboard(tmp_path, picture):
    pytest.importorskip("tensorboard", reason="needs tensorboard, an extra of this package")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    use(TensorBoard(), tmp_path / "run", picture)
    written = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    written.Reload()
    assert [(e.step, e.value) for e in written.Scalars("federation/test_accuracy")] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert [(e.step, e.value) for e in written.Scalars("leakage/recovered")] == [(2, 0.5)]
    assert [e.value for e in written.Scalars("summary/recovered")] == [4]
    assert written.Images("reconstructions")[0].width > 100


def test_mlflow(tmp_path, picture):
    pytest.importorskip("mlflow", reason="needs mlflow, an extra of this package")
    database = tmp_path / "new" / "m.db"
    tracker = MLflow(f"sqlite:///{database}", artifacts=str(tmp_path / "kept"), experiment="test")
    use(tracker, tmp_path / "one", picture)
    use(tracker, tmp_path / "two", picture)  # the experiment is there already
    with sqlite3.connect(database) as connection:
        runs = connection.execute("select name, status from runs order by name").fetchall()
        assert runs == [("one", "FINISHED"), ("two", "FINISHED")]
        accuracy = (
            "select step, value from metrics where key = 'federation/test_accuracy' and run_uuid = ? order by step"
        )
        assert connection.execute(accuracy, (tracker.run,)).fetchall() == [(1, 0.25), (2, 0.5), (3, 0.75)]
        parameters = dict(connection.execute("select key, value from params where run_uuid = ?", (tracker.run,)))
        assert (len(parameters), parameters["attack.name"], len(parameters["long"])) == (152, "dlg", 6000)
    assert [path.read_bytes() for path in (tmp_path / "kept").rglob("*.png")] == [picture.read_bytes()] * 2
