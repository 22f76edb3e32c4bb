"""Flower's own strategies, mods and ways to train: none crashes an audit or is read wrongly as consistent."""

import importlib.util
import sys
from itertools import islice
from pathlib import Path

import pytest

from fedleak.audit.checks import CONTRADICTS
from fedleak.audit.findings import EXPOSED, NOT_ATTACKABLE, NOT_SHOWN, PARTLY

STUDY = Path(__file__).parents[2] / "experiments" / "audit" / "study.py"
pytestmark = pytest.mark.skipif(not STUDY.is_file(), reason="experiments/ is not in this distribution")
QUICK = ("FedAdam", "Krum", "client clipping", "local DP, strong", "momentum, 5 steps", "Adam", "frozen head")
OTHERS = {
    "local DP, strong": (NOT_SHOWN, 0.0),
    "momentum, 5 steps": (EXPOSED, 0.92),
    "5 steps": (EXPOSED, 0.98),
    "BatchNorm, 3 steps": (EXPOSED, 0.97),
    "Adam": (PARTLY, 0.79),
    "frozen head": (NOT_ATTACKABLE, None),
    "trained": (None, 0.0),
}


def _study():
    spec = importlib.util.spec_from_file_location("audit_study", STUDY)
    module = importlib.util.module_from_spec(spec)
    sys.modules["audit_study"] = module
    spec.loader.exec_module(module)
    return module


CASES = {case.name: case for case in _study().cases()} if STUDY.is_file() else {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_strategy_or_a_way_to_train_is_audited_rightly(name, tmp_path):
    study = _study()
    rows = list(islice(study.audited(CASES[name], 20, tmp_path, 1), study.NODES))
    verdict, least = OTHERS.get(name, (EXPOSED, 1.0))
    assert len(rows) == study.NODES
    for row in rows:
        assert row.stated == "right"
        assert row.preflight != CONTRADICTS, row
        assert row.right, row
        assert verdict in (None, row.verdict), row
        assert row.accuracy is None if least is None else row.accuracy >= least


def test_the_table_holds_what_flower_has():
    from flwr.serverapp import strategy

    assert set(CASES) >= set(QUICK) | set(OTHERS)
    named = {"FedAvg", "FedProx", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "QFedAvg", "FedMedian", "Krum"}
    assert named | {"FedTrimmedAvg"} <= set(CASES) & set(dir(strategy))
