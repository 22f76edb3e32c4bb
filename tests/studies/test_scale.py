"""The study of what a federation costs: every quantity is measured, and what it says of the disk is what lies there."""

import pandas as pd
import pytest

from fedleak.cli import main

TINY = ["study.clients=[2]", "study.batch_sizes=[1]", "study.widths=[8]", "study.rounds=2", "study.long=2"]


def test_it_measures_pairs_rounds_and_victims(tmp_path):
    few = ["study.victims=[2]", "study.pairs=2", "attack.max_evaluations=2", "data.image_size=8"]
    assert main(["run", "experiment=scale", *TINY, *few, f"output_dir={tmp_path / 'scale'}"]) == 0
    results, rounds, victims = (
        pd.read_csv(tmp_path / "scale" / name) for name in ("results.csv", "rounds.csv", "victims.csv")
    )
    assert list(results["federation"].value_counts(sort=False).items()) == [
        ("clients=2 batch_size=1", 2),
        ("width=8", 2),
    ]
    measured = results[["seconds", "seconds_captured", "cpu", "cpu_captured", "copy", "megabytes"]]
    assert (measured > 0).all().all()
    assert results["overhead"].tolist() == pytest.approx(results["seconds_captured"] / results["seconds"] - 1)
    assert results["files"].tolist() == [6] * 4  # two rounds' captures and truth, the index, and info.json
    assert rounds["round"].tolist() == [1, 2]
    assert (rounds["memory_mib"] > 10).all()
    assert victims["victims"].tolist() == [2]
    assert not any(path.is_dir() for path in (tmp_path / "scale").iterdir() if path.name != ".hydra")


def test_what_cannot_be_is_refused(tmp_path, capsys):
    where = f"output_dir={tmp_path / 'scale'}"
    assert main(["run", "experiment=scale", *TINY, "study.pairs=0", where]) == 2
    assert "study.pairs=0" in capsys.readouterr().err
    assert main(["run", "experiment=scale", *TINY, "study.clients=[9000]", where]) == 2
    assert not (tmp_path / "scale").exists()
