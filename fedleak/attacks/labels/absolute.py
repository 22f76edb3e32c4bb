"""The founding study's first idea for a better version 1: absolute values."""

from __future__ import annotations

from fedleak.attacks.base import Knowledge, Run
from fedleak.attacks.labels.counting import CountInference, Counts, Evidence
from fedleak.attacks.labels.version1 import version1


class Absolute(CountInference):
    """Version 1 on sign(g_c) Σ_k |∂L/∂W[c, k]|, where entries of opposite sign do not cancel. Needs `batch_size`."""

    def count(self, evidence: Evidence, knowledge: Knowledge, run: Run) -> Counts:
        """Label counts of N updates at once."""
        size = evidence.weight.abs().sum(dim=2).double()
        return version1(evidence.sums.sign() * size, evidence.totals)
