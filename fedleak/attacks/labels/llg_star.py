"""LLG*: LLG with impact and offset measured on dummy inputs in the attacked model."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge, Run
from fedleak.attacks.labels.counting import CountInference, Counts, Evidence, scale_known
from fedleak.attacks.labels.llg import greedy_counts
from fedleak.attacks.labels.probe import Probe, dummy_images, probe


def single_class_batches(found: Probe, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """What batches with one label each would give as summed gradients g_c.

    A batch of inputs with features h (s = Σ_k h_k) and probabilities p that all carry label i gives
    g_i = mean (p_i - 1) s and g_j = mean p_j s.

    Args:
        found: M inputs in U networks.
        labels: ``[M]``, to build the batch of class i from inputs of class i; None to build it from all inputs.

    Returns:
        ``[U]``, the mean over classes i of g_i given that all labels are i, and ``[U, C]``, for each class j the mean
        of g_j over the batches with another label.
    """
    sums = found.sums
    mass = found.probabilities.double() * sums[..., None]  # [U, M, C]: p_c s of each input
    classes = mass.shape[2]
    if labels is None:
        return (mass.mean(dim=1) - sums.mean(dim=1, keepdim=True)).mean(dim=1), mass.mean(dim=1)
    present = [label for label in range(classes) if bool((labels == label).any())]
    batches = torch.stack([mass[:, labels == label].mean(dim=1) for label in present], dim=1)  # [U, I, C]
    own = torch.stack([(mass[..., i][:, labels == i] - sums[:, labels == i]).mean(dim=1) for i in present], dim=1)
    others = torch.tensor([[float(i != j) for j in range(classes)] for i in present], dtype=torch.float64)
    return own.mean(dim=1), (batches * others).sum(dim=1) / others.sum(dim=0).clamp(min=1)


class LLGStar(CountInference):
    """Impact and offsets from single-class batches of dummy inputs (LLG*, Wainakh et al. 2021). Needs `batch_size`.

    Args:
        inputs: dummy inputs, uniform noise images.
    """

    def __init__(self, inputs: int = 16) -> None:
        self.inputs = inputs

    def count(self, evidence: Evidence, knowledge: Knowledge, run: Run) -> Counts:
        """Label counts of N updates at once."""
        scale_known(evidence, "llg_star")
        found = probe(evidence.observations, evidence.layer, knowledge, dummy_images(knowledge, self.inputs, run.seed))
        impact, offset = single_class_batches(found, None)
        which = found.which
        return greedy_counts(evidence.sums, impact[which] / evidence.totals, offset[which], evidence.totals)
