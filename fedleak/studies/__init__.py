"""Studies over many fresh networks or federations: ``fedleak run experiment=NAME`` and ``fedleak labels``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedleak.studies.aggregation import Aggregation
    from fedleak.studies.base import Job, Results, Study, build_study, run_study
    from fedleak.studies.batch_size import BatchSize
    from fedleak.studies.biased_data import BiasedData
    from fedleak.studies.condensation import Condensation
    from fedleak.studies.federations import Cells, cell_setup, check_cells, run_cells
    from fedleak.studies.first_defenses import FirstDefenses
    from fedleak.studies.fresh import FreshNetworks
    from fedleak.studies.frontier import Frontier
    from fedleak.studies.idlg_table1 import IdlgTable1
    from fedleak.studies.labels import LabelInferenceStudy
    from fedleak.studies.limit import LimitStudy
    from fedleak.studies.local_steps import LocalSteps
    from fedleak.studies.mlp_dlg import MlpDlg
    from fedleak.studies.networks import Networks
    from fedleak.studies.relu import ReluStudy
    from fedleak.studies.rounds import Rounds
    from fedleak.studies.scale import Scale

__all__ = [
    "Aggregation",
    "BatchSize",
    "BiasedData",
    "Cells",
    "Condensation",
    "FirstDefenses",
    "FreshNetworks",
    "Frontier",
    "IdlgTable1",
    "Job",
    "LabelInferenceStudy",
    "LimitStudy",
    "LocalSteps",
    "MlpDlg",
    "Networks",
    "ReluStudy",
    "Results",
    "Rounds",
    "Scale",
    "Study",
    "build_study",
    "cell_setup",
    "check_cells",
    "run_cells",
    "run_study",
]

_HOME = {
    "Aggregation": "fedleak.studies.aggregation",
    "BatchSize": "fedleak.studies.batch_size",
    "BiasedData": "fedleak.studies.biased_data",
    "Cells": "fedleak.studies.federations",
    "Condensation": "fedleak.studies.condensation",
    "FirstDefenses": "fedleak.studies.first_defenses",
    "FreshNetworks": "fedleak.studies.fresh",
    "Frontier": "fedleak.studies.frontier",
    "IdlgTable1": "fedleak.studies.idlg_table1",
    "Job": "fedleak.studies.base",
    "LabelInferenceStudy": "fedleak.studies.labels",
    "LimitStudy": "fedleak.studies.limit",
    "LocalSteps": "fedleak.studies.local_steps",
    "MlpDlg": "fedleak.studies.mlp_dlg",
    "Networks": "fedleak.studies.networks",
    "ReluStudy": "fedleak.studies.relu",
    "Results": "fedleak.studies.base",
    "Rounds": "fedleak.studies.rounds",
    "Scale": "fedleak.studies.scale",
    "Study": "fedleak.studies.base",
    "build_study": "fedleak.studies.base",
    "cell_setup": "fedleak.studies.federations",
    "check_cells": "fedleak.studies.federations",
    "run_cells": "fedleak.studies.federations",
    "run_study": "fedleak.studies.base",
}


def __getattr__(name: str) -> Any:
    # Lazily: each study brings its own pictures, and one of them is run at a time.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
