"""Images from updates: gradient matching, its objectives, priors and optimisers."""

from fedleak.attacks.inversion.chooser import Chooser
from fedleak.attacks.inversion.features import FeaturesFirst
from fedleak.attacks.inversion.gradient_matching import GradientMatching
from fedleak.attacks.inversion.gradinversion import GradInversion
from fedleak.attacks.inversion.joint import Joint
from fedleak.attacks.inversion.learned import Learned
from fedleak.attacks.inversion.local_steps import Surrogate, Unrolled
from fedleak.attacks.inversion.map import MAP
from fedleak.attacks.inversion.objectives import L2, Cosine, Elementwise, Objective, RelativeL2
from fedleak.attacks.inversion.optimizers import LBFGS, Adam, Optimizer
from fedleak.attacks.inversion.peeling import Peeling
from fedleak.attacks.inversion.priors import ImageNorm, Prior, SmoothTotalVariation, TotalVariation
from fedleak.attacks.inversion.schedule import InTurn, Schedule, Standing
from fedleak.attacks.inversion.starts import Grey, Normal, Start, Uniform
from fedleak.attacks.inversion.stopping import AsPublished, Stopping

__all__ = [
    "L2",
    "LBFGS",
    "MAP",
    "Adam",
    "AsPublished",
    "Chooser",
    "Cosine",
    "Elementwise",
    "FeaturesFirst",
    "GradInversion",
    "GradientMatching",
    "Grey",
    "ImageNorm",
    "InTurn",
    "Joint",
    "Learned",
    "Normal",
    "Objective",
    "Optimizer",
    "Peeling",
    "Prior",
    "RelativeL2",
    "Schedule",
    "SmoothTotalVariation",
    "Standing",
    "Start",
    "Stopping",
    "Surrogate",
    "TotalVariation",
    "Uniform",
    "Unrolled",
]
