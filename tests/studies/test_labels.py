import pandas as pd
import pytest

from fedleak.cli import main
from fedleak.studies.labels import summarise

SMALL = ["labels", "labels.runs=3", "labels.batch_sizes=[1,4]", "labels.methods=[random,version1,llg_star]"]


def test_the_study_writes_its_tables_and_pictures(tmp_path, capsys):
    out = tmp_path / "study"
    assert main([*SMALL, "labels.stages=[0,5]", f"output_dir={out}"]) == 0
    header = "method,data,partition,stage,batch_size,run,label_accuracy,labels_exact,counts_exact,seconds"
    assert (out / "labels.csv").read_text().splitlines()[0] == header
    table = pd.read_csv(out / "labels.csv")
    assert len(table) == 3 * 2 * 2 * 2 * 3
    assert set(table["partition"]) == {"iid", "biased"}
    assert table[(table.method == "version1") & (table.batch_size == 1) & (table.stage == 0)].labels_exact.all()
    for picture in ("accuracy", "whole_batch", "stages", "gradient_against_count"):
        assert (out / f"{picture}.png").stat().st_size > 5_000
    assert "llg_star" in capsys.readouterr().out


def test_a_killed_study_takes_over_the_cells_it_had_finished(tmp_path):
    assert main([*SMALL, f"output_dir={tmp_path}"]) == 0
    whole = pd.read_csv(tmp_path / "labels.csv")
    whole.assign(seconds=7.0).iloc[:8].to_csv(tmp_path / "labels.csv", index=False)  # two cells and two runs of a third
    assert main(["run", f"resume={tmp_path}"]) == 0
    again = pd.read_csv(tmp_path / "labels.csv")
    assert (again["seconds"] == 7.0).tolist() == [True] * 6 + [False] * (len(whole) - 6)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), whole.drop(columns="seconds"))


def test_one_partition_can_be_chosen_and_one_seed_gives_one_result(tmp_path):
    for name in ("a", "b"):
        assert main([*SMALL, "partition=biased", "seed=4", f"output_dir={tmp_path / name}"]) == 0
    a, b = (pd.read_csv(tmp_path / name / "labels.csv").drop(columns="seconds") for name in ("a", "b"))
    pd.testing.assert_frame_equal(a, b)
    assert set(a["partition"]) == {"biased"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("labels.methods=[foo]", "labels.methods=foo: no such choice of attack/labels; choices: absolute"),
        ("labels.runs=0", "labels.runs=0: must be"),
        ("labels.batch_sizes=[]", "labels.batch_sizes=[]: must be"),
        ("labels.batch_sizes=[0]", "labels.batch_sizes=[0]: must be"),
        ("partition=shards", "partition=shards: fedleak labels draws batches iid or biased"),
        ("labels.run=3", "labels.run=3: unknown key; did you mean labels.runs?"),
    ],
)
def test_bad_input_is_one_clear_line(capsys, override, message):
    assert main(["labels", override]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_intervals():
    frame = pd.DataFrame(
        {"method": "m", "data": "d", "partition": "iid", "stage": 0, "batch_size": 2, "run": [0, 1], "seconds": 0.0}
        | {"label_accuracy": [0.0, 1.0], "labels_exact": [False, True], "counts_exact": [0.5, 1.0]}
    )
    [row] = summarise(frame).to_dict("records")
    assert (row["label_accuracy"], row["labels_exact"], row["counts_exact"]) == (0.5, 0.5, 0.75)
    assert (row["low"], row["high"]) == (0.0, 1.0)
