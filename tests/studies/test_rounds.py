import pandas as pd
import pytest

from fedleak.cli import main

SMALL = [
    "run",
    "experiment=rounds",
    "study.rounds=3",
    "study.every=1",
    "study.moments=[1,3]",
    "study.clients=1",
    "study.methods=[random,version1]",
    "study.seeds=2",
    "federation.clients=2",
    "federation.batch_size=1",
    "attack=idlg",
    "attack.restarts=2",
]


def test_leakage_stands_beside_utility_round_by_round(tmp_path, capsys):
    assert main([*SMALL, f"output_dir={tmp_path}"]) == 0
    summary = pd.read_csv(tmp_path / "summary.csv")
    assert list(summary["round"]) == [1, 3]
    assert list(summary["images"]) == [2, 2], "one victim of one image in each of two federations"
    assert list(summary["runs"]) == [2, 2]
    assert summary.recovered.between(summary.low, summary.high).all()
    assert summary.recovered[0] >= 0.5, "the images of an untrained sigmoid LeNet leak"
    images = pd.read_csv(tmp_path / "images.csv")
    assert images.groupby("round").recovered.mean().tolist() == pytest.approx(summary.recovered.tolist())
    labels = pd.read_csv(tmp_path / "label_summary.csv")
    assert list(labels.updates.unique()) == [4], "every client of both federations"
    assert set(labels["round"]) == {1, 2, 3}
    by_method = labels.groupby("method").label_accuracy.mean()
    assert by_method["version1"] > by_method["random"]
    for seed in (0, 1):
        rounds = pd.read_csv(tmp_path / f"seed-{seed}" / "rounds.csv")
        mine = pd.read_csv(tmp_path / "accuracy.csv").query(f"federation == 'seed-{seed}'")
        assert mine.test_accuracy.tolist() == rounds.test_accuracy.tolist()
    for picture in ("rounds", "reconstructions"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 5_000
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["study.moments=[2]", "study.every=2"], "study.moments=2: not among the captured rounds 1, 3, … up to 3"),
        (["study.moments=[4]"], "study.moments=4: not among the captured rounds"),
        (["study.clients=0"], "study.clients=0: must be a whole number from 1"),
        (["study.methods=[foo]"], "study.methods=foo: no such choice of attack/labels"),
        (["study.methods=[llg_plus]"], "study.methods=llg_plus needs auxiliary_data"),
        (
            ["study.methods=[idlg]", "federation.batch_size=2", "attack=fedleak"],
            "study.methods=idlg: reads 1 sample an update, not 2; leave it out",
        ),
        (["attack=none"], "attack=none: the study attacks images"),
        (["federation.clients=100000"], "federation.clients=100000"),
    ],
)
def test_bad_input_is_one_clear_line_before_any_work(tmp_path, capsys, overrides, message):
    assert main([*SMALL, *overrides, f"output_dir={tmp_path / 'run'}"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_view_counts_in_a_study_of_federations_and_is_refused_where_clients_share_no_model(tmp_path, capsys):
    view = ["attack=fedleak", "attack/view=secure_sum", "attack.restarts=1", "attack.max_evaluations=2"]
    settings = ["study.clients=2", "study.rounds=1", "study.moments=[1]", "study.seeds=1"]
    assert main([*SMALL, *settings, *view, f"output_dir={tmp_path / 'rounds'}"]) == 0
    images = pd.read_csv(tmp_path / "rounds" / "images.csv")
    assert images.client.tolist() == [0, 0], "both clients' images, in one sum"
    assert main(["run", "experiment=mlp_dlg", "data=digits", *view[1:2], f"output_dir={tmp_path / 'mlp'}"]) == 2
    assert "share no model; leave attack.view out" in capsys.readouterr().err
