"""The bias gradient's identity, with the mean probability taken from auxiliary data."""

from __future__ import annotations

from typing import ClassVar

from fedleak.attacks.base import Knowledge, Run
from fedleak.attacks.labels.counting import CountInference, Counts, Evidence, bias_gradient, scale_known
from fedleak.attacks.labels.probe import auxiliary_images, probe
from fedleak.attacks.labels.zlg import identity


class IdentityAux(CountInference):
    """λ = B (p̄ − ∂L/∂b), p̄ from auxiliary data. Needs `batch_size` and `auxiliary_data`.

    Args:
        per_class: auxiliary images of each class at most.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"batch_size", "auxiliary_data"})

    def __init__(self, per_class: int = 5) -> None:
        self.per_class = per_class

    def count(self, evidence: Evidence, knowledge: Knowledge, run: Run) -> Counts:
        """Label counts of N updates at once."""
        scale_known(evidence, "identity_aux")
        images, _ = auxiliary_images(knowledge, self.per_class, run.seed, "identity_aux")
        found = probe(evidence.observations, evidence.layer, knowledge, images)
        mean = found.probabilities.mean(dim=1)[found.which]
        return identity(mean, bias_gradient(evidence, knowledge, run.seed), evidence.totals)
