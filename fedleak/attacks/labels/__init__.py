"""Label inference: which labels are behind an update. One file a method; `counting` and `last_layer` are shared."""

from fedleak.attacks.labels.idlg import IDLG
from fedleak.attacks.labels.joint import Joint
from fedleak.attacks.labels.known import Known
from fedleak.attacks.labels.per_sample import PerSample
from fedleak.attacks.labels.random import Random
from fedleak.attacks.labels.version1 import Version1

__all__ = ["IDLG", "Joint", "Known", "PerSample", "Random", "Version1"]
