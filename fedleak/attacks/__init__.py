"""The attacker: `Observation`s in, `Reconstruction`s out.

Needs torch and numpy only, so that it runs on a bare GPU machine::

    attack = Attack(IDLG(), GradientMatching(restarts=8))
    reconstructions = attack(observations, Knowledge(model, (1, 28, 28), 10))
"""

from fedleak.attacks.attack import Attack, LabelsOnly
from fedleak.attacks.base import Inversion, Knowledge, LabelGuess, LabelInference, Run
from fedleak.attacks.results import Progress, Reconstruction, StopReason
from fedleak.attacks.views import SecureSum, Updates, View

__all__ = [
    "Attack",
    "Inversion",
    "Knowledge",
    "LabelGuess",
    "LabelInference",
    "LabelsOnly",
    "Progress",
    "Reconstruction",
    "Run",
    "SecureSum",
    "StopReason",
    "Updates",
    "View",
]
