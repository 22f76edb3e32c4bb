"""Studies over many fresh networks or federations: ``fedleak run experiment=NAME`` and ``fedleak labels``."""

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
from fedleak.studies.rounds import Rounds

__all__ = [
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
    "Results",
    "Rounds",
    "Study",
    "build_study",
    "cell_setup",
    "check_cells",
    "run_cells",
    "run_study",
]
