"""iLRG: class embeddings from the gradient, then a small linear system for the counts."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge, Run
from fedleak.attacks.labels.counting import (
    CountInference,
    Counts,
    Evidence,
    bias_gradient,
    round_counts,
    scale_known,
)


def class_confidences(weight: Tensor, bias: Tensor, head: Tensor, head_bias: Tensor | None) -> Tensor:
    """Softmax outputs of the last layer at each class's embedding (∂L/∂W_j)/(∂L/∂b_j).

    Args:
        weight: ``[N, C, d]``, ∂L/∂W.
        bias: ``[N, C]``, ∂L/∂b.
        head: ``[N, C, d]``, W.
        head_bias: ``[N, C]``, b.

    Returns:
        ``[N, C, C]``, row i the probabilities of samples of class i.
    """
    floor = 1e-30
    safe = torch.where(bias.abs() < floor, torch.full_like(bias, floor), bias)
    logits = (weight / safe[..., None]) @ head.transpose(1, 2)
    if head_bias is not None:
        logits = logits + head_bias[:, None]
    return torch.nan_to_num(logits.double(), posinf=1e30, neginf=-1e30).softmax(dim=2)


def solve_counts(confidences: Tensor, bias: Tensor, totals: Tensor) -> Tensor:
    """``[N, C]`` float64, the λ that solves Σλ = B and Σ_i λ_i p_i[j] − λ_j = B ∂L/∂b_j by least squares."""
    batch, classes = bias.shape
    system = confidences.transpose(1, 2) - torch.eye(classes, dtype=torch.float64)
    system = torch.cat([system, torch.ones(batch, 1, classes, dtype=torch.float64)], dim=1)
    target = torch.cat([bias.double() * totals[:, None], totals[:, None].double()], dim=1)
    gram = system.transpose(1, 2) @ system
    ridge = 1e-10 * gram.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * torch.eye(classes, dtype=torch.float64)
    result: Tensor = torch.linalg.solve(gram + ridge, system.transpose(1, 2) @ target[..., None])[..., 0]
    return result


class ILRG(CountInference):
    """Class embeddings, then least squares for the counts (iLRG, Ma et al. 2023). Needs `batch_size`.

    Made for batches whose samples of one class have similar features. Without a bias in the layer its gradient is
    estimated (`bias_gradient`).
    """

    def count(self, evidence: Evidence, knowledge: Knowledge, run: Run) -> Counts:
        """Label counts of N updates at once."""
        scale_known(evidence, "ilrg")
        layer, held = evidence.layer, [observation.parameters for observation in evidence.observations]
        head = torch.stack([parameters[layer.weight] for parameters in held])
        head_bias = torch.stack([parameters[layer.bias] for parameters in held]) if layer.bias else None
        bias = bias_gradient(evidence, knowledge, run.seed)
        confidences = class_confidences(evidence.weight, bias.to(head.dtype), head, head_bias)
        expected = solve_counts(confidences, bias, evidence.totals)
        return Counts(round_counts(expected, evidence.totals), expected)
