"""Label inference: which labels are behind an update. One file a method; `counting` and `last_layer` are shared."""

from fedleak.attacks.labels.absolute import Absolute
from fedleak.attacks.labels.bias import Bias
from fedleak.attacks.labels.dummy_batches import DummyBatches
from fedleak.attacks.labels.fedleak import Fedleak
from fedleak.attacks.labels.gradinversion import GradInversion
from fedleak.attacks.labels.identity_aux import IdentityAux
from fedleak.attacks.labels.idlg import IDLG
from fedleak.attacks.labels.ilrg import ILRG
from fedleak.attacks.labels.joint import Joint
from fedleak.attacks.labels.known import Known
from fedleak.attacks.labels.learned import Learned
from fedleak.attacks.labels.llg import LLG
from fedleak.attacks.labels.llg_plus import LLGPlus
from fedleak.attacks.labels.llg_star import LLGStar
from fedleak.attacks.labels.per_sample import PerSample
from fedleak.attacks.labels.random import Random
from fedleak.attacks.labels.rlg import RLG
from fedleak.attacks.labels.version1 import Version1
from fedleak.attacks.labels.zlg import ZLG

__all__ = [
    "IDLG",
    "ILRG",
    "LLG",
    "RLG",
    "ZLG",
    "Absolute",
    "Bias",
    "DummyBatches",
    "Fedleak",
    "GradInversion",
    "IdentityAux",
    "Joint",
    "Known",
    "LLGPlus",
    "LLGStar",
    "Learned",
    "PerSample",
    "Random",
    "Version1",
]
