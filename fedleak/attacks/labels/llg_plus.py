"""LLG+: LLG with impact and offset measured on auxiliary data in the attacked model."""

from __future__ import annotations

from typing import ClassVar

from fedleak.attacks.base import Knowledge, Run
from fedleak.attacks.labels.counting import CountInference, Counts, Evidence, scale_known
from fedleak.attacks.labels.llg import greedy_counts
from fedleak.attacks.labels.llg_star import single_class_batches
from fedleak.attacks.labels.probe import auxiliary_images, probe


class LLGPlus(CountInference):
    """Impact and offsets from single-class batches of auxiliary data (LLG+, Wainakh et al. 2021).

    Needs `batch_size` and `auxiliary_data`.

    Args:
        per_class: auxiliary images of each class at most.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"batch_size", "auxiliary_data"})

    def __init__(self, per_class: int = 5) -> None:
        self.per_class = per_class

    def count(self, evidence: Evidence, knowledge: Knowledge, run: Run) -> Counts:
        """Label counts of N updates at once."""
        scale_known(evidence, "llg_plus")
        images, labels = auxiliary_images(knowledge, self.per_class, run.seed, "llg_plus")
        found = probe(evidence.observations, evidence.layer, knowledge, images)
        impact, offset = single_class_batches(found, labels)
        which = found.which
        return greedy_counts(evidence.sums, impact[which] / evidence.totals, offset[which], evidence.totals)
