"""The study of the tutorials' CNN: a row a cell and attack, one setting changed at a time, and a control."""

from pathlib import Path

import pandas as pd
import pytest

from fedleak.cli import main
from fedleak.errors import UsageError
from fedleak.studies import ReluStudy


def test_it_runs_on_the_digits(tmp_path: Path):
    out = tmp_path / "out"
    arguments = ["experiment=relu", "data=digits", "quick=true", "study.steps=[2]"]
    assert main(["run", *arguments, f"output_dir={out}"]) == 0
    summary = pd.read_csv(out / "summary.csv")
    cells = summary[["update", "activation", "steps", "batch_size"]].to_numpy().tolist()
    assert cells == [
        ["gradient", "relu", 0, 1],
        ["gradient", "relu", 2, 1],
        ["gradient", "relu", 0, 2],
        ["control", "relu", 0, 1],
    ]
    assert summary["images"].tolist() == [1, 1, 2, 1]
    assert (summary["limit_mse"][:2] > 0).all()
    assert summary["limit_mse"][2:].isna().all()
    assert summary["mse"].iloc[-1] > 1e-2  # there is nothing in the control to find
    assert (out / "relu.png").stat().st_size > 0


def test_impossible_settings_are_refused():
    for wrong in (
        {"activations": ["swish"]},
        {"activations": []},
        {"steps": [0]},
        {"batch_sizes": [1]},
        {"networks": 0},
    ):
        with pytest.raises(UsageError, match=f"study.{next(iter(wrong))}"):
            ReluStudy(**{"networks": 1, "attacks": {}} | wrong)
