"""The study of the limit: every cell has its row, reached beside possible, and a control."""

from pathlib import Path

import pandas as pd
import pytest

from fedleak.cli import main
from fedleak.errors import UsageError
from fedleak.studies import LimitStudy


def test_it_runs_on_the_digits(tmp_path: Path):
    out = tmp_path / "out"
    assert (
        main(
            [
                "run",
                "experiment=limit",
                "data=digits",
                "study.networks=1",
                "study.noise=[0.1]",
                "study.pruning=[0.5]",
                f"output_dir={out}",
            ]
        )
        == 0
    )
    summary = pd.read_csv(out / "summary.csv").set_index("defense")
    assert list(summary.index) == ["noise", "pruning", "control"]
    assert 0 < summary.loc["noise", "limit_mse"] < 0.1
    assert summary.loc["pruning", "recovered"] == 1
    assert pd.isna(summary.loc["control", "limit_mse"])
    assert summary.loc["control", "recovered"] == 0
    assert (out / "limit.png").stat().st_size > 0


def test_impossible_settings_are_refused():
    with pytest.raises(UsageError, match=r"study\.noise"):
        LimitStudy(networks=1, noise=[-1.0])
    with pytest.raises(UsageError, match=r"study\.networks"):
        LimitStudy(networks=0)
