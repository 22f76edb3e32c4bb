"""The study of aggregation: what a sum of clients shows is what one client with all images would have sent."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from fedleak.data.datasets import digits
from fedleak.errors import UsageError
from fedleak.setup import compose
from fedleak.studies import Aggregation, Job


def job(folder: Path) -> Job:
    return Job(compose(["data=digits"]), ["data=digits"], folder)


def test_a_sum_shows_what_one_client_would_have_sent(tmp_path: Path):
    study = Aggregation(["attack=map"], [3], networks=1)
    seen = {}
    for view in ("one client", "sum", "models", "noise"):
        observation, truth, _ = study._victims(job(tmp_path), digits(), view, 3, 0)
        seen[view] = observation.gradient()
        assert len(truth.labels) == 3
    for name, value in seen["one client"].items():
        torch.testing.assert_close(seen["sum"][name], value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(seen["models"][name], value, rtol=1e-2, atol=1e-5)
        assert not torch.allclose(seen["noise"][name], value, rtol=0.1, atol=1e-3)


def test_it_runs_on_the_digits(tmp_path: Path):
    study = Aggregation(["attack=map", "attack.restarts=1"], [1], networks=1, seen=["models", "noise"])
    study.check(job(tmp_path))
    study.run(job(tmp_path))
    summary = pd.read_csv(tmp_path / "summary.csv").set_index("seen")
    assert list(summary.index) == ["models", "noise"]
    assert summary.loc["models", "recovered"] == 1
    assert summary.loc["noise", "recovered"] == 0
    assert (tmp_path / "aggregation.png").stat().st_size > 0


def test_impossible_settings_are_refused():
    for settings in ({"networks": 0}, {"clients": [0]}, {"seen": ["everything"]}):
        with pytest.raises(UsageError, match=rf"study\.{next(iter(settings))}"):
            Aggregation(**{"attack": [], "clients": [1], "networks": 1, **settings})
