"""Studies on fresh networks: what they draw, what they write, what they refuse."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from fedleak.attacks import Reconstruction
from fedleak.attacks.results import is_converged
from fedleak.cli import main
from fedleak.errors import UsageError
from fedleak.federation.scenario import load_data
from fedleak.instantiate import Part
from fedleak.setup import compose
from fedleak.studies import FreshNetworks, IdlgTable1, Job
from fedleak.studies.fresh import blown_up, draw_victims, judge
from fedleak.studies.named_data import load_named
from fedleak.threat import ThreatModel
from fedleak.truth import Truth

DIGITS = Part("data", {"_target_": "fedleak.data.digits"})
LENET = Part("model", {"_target_": "fedleak.models.LeNet", "init": "uniform"})
SIGN_RULE = ["attack=labels_only", "attack/labels=idlg"]
DLG = ["attack=dlg", "attack/inversion=as_published", "attack.restarts=1", "attack.max_evaluations=60"]


def victims(numbers, batch_size=2, **granted):
    return draw_victims(load_data(DIGITS), LENET, numbers, batch_size, ThreatModel(**granted), 0)


def reconstruction(**values):
    given = {
        "images": torch.zeros(1, 1, 28, 28),
        "labels": torch.tensor([3]),
        "objective": 0.1,
        "stop_reason": "budget",
    }
    return Reconstruction(1, 0, evaluations=5, seconds=0.1, **given | values)


def test_a_network_and_its_batch_are_the_same_whatever_else_is_drawn():
    alone, among = victims([3]), victims(range(5))
    assert torch.equal(alone.truths[0].images, among.truths[3].images)
    for name, value in alone.observations[0].update.items():
        assert torch.equal(value, among.observations[3].update[name])
    assert not torch.equal(among.truths[0].images, among.truths[1].images)
    weights = [observation.parameters["fc.weight"] for observation in among.observations]
    assert not torch.equal(weights[0], weights[1])


def test_single_samples_share_their_gradients_where_that_is_granted():
    whole, single = victims([0]).observations[0], victims([0], per_sample_gradients=True).observations[0]
    assert single.training.per_sample
    for name, value in whole.update.items():
        torch.testing.assert_close(single.update[name].mean(0), value)


def test_the_judgement_of_labels_at_the_best_and_at_the_last_step():
    truth = Truth(1, 0, torch.zeros(1, 1, 28, 28), torch.tensor([3]))
    row = judge(reconstruction(details={"last_labels": "4"}), truth)
    assert (row["label_accuracy"], row["last_label_accuracy"], row["mse"], row["recovered"]) == (1.0, 0.0, 0.0, 1.0)
    assert judge(reconstruction(), truth)["last_label_accuracy"] == 1.0
    only = judge(reconstruction(objective=math.nan, stop_reason="labels_only"), truth)
    assert (only["label_accuracy"], only["mse"], only["recovered"]) == (1.0, None, None)


def test_whatever_method_converged_is_converged():
    reasons = ["converged", "converged by features first", "stalled by features first", "budget", None, math.nan]
    assert [is_converged(reason) for reason in reasons] == [True, True, False, False, False, False]


def test_a_start_has_blown_up_if_it_ends_above_its_beginning():
    assert blown_up([(1, 5.0), (2, 7.0), (3, 4.0)]) is False
    assert blown_up([(1, 5.0), (2, 1.0), (3, 6.0)]) is True
    assert blown_up([(1, 5.0), (2, math.nan)]) is True
    assert blown_up([(1, 5.0)]) is None


def test_a_folder_of_class_folders_does_for_any_name_and_all_that_is_missing_is_named(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (40, 50), (90 * number, 0, 0)).save(tmp_path / name / f"{number}.png")
    data = load_named(["cifar100"], {"cifar100": str(tmp_path)})["cifar100"]
    assert (data.name, data.image_shape, data.classes) == ("cifar100", (3, 32, 32), 2)
    with pytest.raises(UsageError) as error:
        load_named(["mnist", "digits", "svhn"], {"mnist": "/no/such", "svhn": "/nor/this"})
    for part in ("study.roots.mnist=/no/such", "study.roots.svhn=/nor/this", "study.datasets=[digits]"):
        assert part in str(error.value)
    with pytest.raises(UsageError, match=r"study\.datasets=mnits: no such choice of data; choices: .*mnist"):
        load_named(["mnits"], {})


def test_the_table_and_the_picture(tmp_path):
    study = IdlgTable1(
        {"dlg": DLG, "idlg_labels": SIGN_RULE}, 6, datasets=["digits"], fewer={"digits": {"dlg": 4}, "mnist": None}
    )
    job = Job(compose([]), [], tmp_path)
    study.check(job)
    shown = study.run(job)
    assert shown["networks"].tolist() == [4, 6]
    rows, summary = pd.read_csv(tmp_path / "results.csv"), pd.read_csv(tmp_path / "summary.csv")
    assert rows.groupby("attack").size().to_dict() == {"dlg": 4, "idlg_labels": 6}
    sign_rule = summary.set_index("attack").loc["idlg_labels"]
    assert (sign_rule["label_accuracy"], sign_rule["label_accuracy_high"]) == (1.0, 1.0)
    assert sign_rule["label_accuracy_low"] == pytest.approx(6 / (6 + 1.96**2), abs=1e-4)  # Wilson's for all of six
    assert math.isnan(sign_rule["median_mse"])
    assert (tmp_path / "labels.png").stat().st_size > 5_000


SMALL_TABLE = ["experiment=idlg_table1", "quick=true", "study.datasets=[digits]"]
SMALL_TABLE += ["~study.attacks.dlg", "~study.attacks.dlg_restarts", "~study.attacks.idlg", "study.chunk=2"]


class Undrawn(FreshNetworks):
    """Without a picture."""

    def draw(self, frame, summary, job):
        pass


def test_an_interrupted_study_goes_on_where_it_stopped(tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["run", *SMALL_TABLE, "study.networks=5", f"output_dir={whole}"]) == 0
    assert main(["run", *SMALL_TABLE, "study.networks=3", f"output_dir={broken}"]) == 0
    kept = pd.read_csv(broken / "results.csv")
    kept["seconds"] = 7.0  # what is taken is not computed again
    kept.iloc[[0, 2]].to_csv(broken / "results.csv", index=False)
    resumed = [*SMALL_TABLE, "study.networks=5", f"study.resume={broken}"]
    assert main(["run", *resumed, f"output_dir={tmp_path / 'resumed'}"]) == 0
    rows = pd.read_csv(tmp_path / "resumed" / "results.csv").sort_values("network", ignore_index=True)
    assert (rows["seconds"] == 7.0).tolist() == [True, False, True, False, False]
    expected = pd.read_csv(whole / "results.csv")
    pd.testing.assert_frame_equal(rows.drop(columns="seconds"), expected.drop(columns="seconds"))
    for override, message in ((["seed=1"], "seed was another there"), ([f"study.resume={tmp_path}"], "no results.csv")):
        assert main(["run", *resumed, *override, f"output_dir={tmp_path / 'other'}"]) == 2
        assert message in capsys.readouterr().err


def test_published_procedures_take_the_evaluations_of_their_batch_size(tmp_path):
    attacks = {"dlg": ["attack=dlg", "attack/inversion=published_code", "attack.restarts=1"]}
    study = Undrawn(attacks, 2, batch_sizes=[1, 2], datasets=["digits"], evaluations=[21, 41])
    study.run(Job(compose([]), [], tmp_path))
    rows = pd.read_csv(tmp_path / "results.csv")
    assert rows.groupby("batch_size")["evaluations"].max().to_dict() == {1: 21, 2: 41}
    with pytest.raises(UsageError, match=r"study\.evaluations=\[21\]: must be one for each of"):
        IdlgTable1(attacks, 2, batch_sizes=[1, 2], evaluations=[21])


@pytest.mark.parametrize(
    ("name", "settings", "picture"),
    [
        ("batch_size", ["study.batch_sizes=[1,2]", "study.networks=[2,2]", "study.evaluations=[41,41]"], "errors"),
        ("mlp_dlg", ["study.networks=2", "study.budgets=[3,30]"], "evaluations"),
    ],
)
def test_the_other_studies_on_fresh_networks(tmp_path: Path, name, settings, picture):
    assert main(["run", f"experiment={name}", "quick=true", "data=digits", *settings, f"output_dir={tmp_path}"]) == 0
    summary = pd.read_csv(tmp_path / "summary.csv")
    assert (summary["networks"] == 2).all()
    assert (tmp_path / f"{picture}.png").stat().st_size > 5_000
    if name == "batch_size":
        assert (summary["networks_right"] + summary["networks_wrong"] == 2).all()
    else:
        assert summary.set_index("attack").loc["closed_form", "median_mse"] < 1e-10


@pytest.mark.parametrize(
    ("experiment", "override", "message"),
    [
        ("idlg_table1", "study.networks=0", "study.networks="),
        ("idlg_table1", "study.network=5", "did you mean study.networks?"),
        ("idlg_table1", "study.datasets=[]", "study.datasets=[]: must be a list"),
        ("idlg_table1", "+study.fewer.mnist.dgl=5", "study.fewer.mnist.dgl: no such attack here"),
        ("idlg_table1", "+study.fewer.mnist.dlg=0", "study.fewer.mnist.dlg=0: must be a whole number"),
        ("idlg_table1", "study.attacks.dlg=['attack=none']", "study.attacks.dlg: attacks nothing"),
        ("idlg_table1", "study.attacks.dlg=['attack=dgl']", "attack=dgl: no such choice"),
        ("batch_size", "study.networks=[1,2]", "must be one number, or one for each of"),
        ("batch_size", "study.attacks.dlg=['attack=idlg']", "reads 1 sample an update, not 4"),
        ("mlp_dlg", "study.budgets=[0]", "study.budgets=[0]: must be a list of whole numbers from 1"),
    ],
)
def test_bad_input_is_one_clear_line(capsys, tmp_path, experiment, override, message):
    data = "study.datasets=[digits]" if experiment == "idlg_table1" else "data=digits"
    assert main(["run", f"experiment={experiment}", data, override, f"output_dir={tmp_path / 'run'}"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_killed_study_is_resumed_in_its_own_folder(tmp_path):
    assert main(["run", *SMALL_TABLE, "study.networks=3", f"output_dir={tmp_path / 'run'}"]) == 0
    path = tmp_path / "run" / "results.csv"
    whole = pd.read_csv(path)
    whole.assign(seconds=7.0).iloc[:2].to_csv(path, index=False)
    assert main(["run", f"resume={tmp_path / 'run'}"]) == 0
    rows = pd.read_csv(path)
    assert (rows["seconds"] == 7.0).tolist() == [True, True, False]
    pd.testing.assert_frame_equal(rows.drop(columns="seconds"), whole.drop(columns="seconds"))
