"""Truncated singular value decomposition of each layer's update (Wang et al. 2018, ATOMO; Vogels et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedleak.defenses.base import Defense, Imitation
from fedleak.errors import UsageError
from fedleak.training import LocalTraining, Tensors


class TruncatedSVD(Defense):
    """Every weight tensor, as a matrix of its first dimension by the rest, in its best approximation of a rank.

    It saves traffic. The gradient of a fully connected layer has the rank of the batch, so that a small batch passes
    unchanged there; only convolutions lose something.

    Args:
        rank: singular values to keep of each tensor of two or more dimensions, at least 1; biases stay as they are.

    Raises:
        UsageError: `rank` is no whole number of at least 1.

    References:
        Wang, Sievert, Liu, Charles, Papailiopoulos, Wright. ATOMO: Communication-efficient learning via atomic
        sparsification. NeurIPS 2018.
        Vogels, Karimireddy, Jaggi. PowerSGD: Practical low-rank gradient compression. NeurIPS 2019.
    """

    knob: ClassVar[str | None] = "rank"

    def __init__(self, rank: int = 2) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise UsageError(f"defense.rank={rank}: must be a whole number of at least 1, such as 2")
        self.rank = rank

    def apply(self, update: Tensors, *, generator: torch.Generator) -> Tensors:
        """U_k S_k V_kᵀ, computed in float64."""
        result = dict(update)
        for name, value in update.items():
            if is_matrix(value) and self.rank < min(matrix(value).shape):
                u, s, v = torch.linalg.svd(matrix(value).double(), full_matrices=False)
                low = (u[:, : self.rank] * s[: self.rank]) @ v[: self.rank]
                result[name] = low.view(value.shape).to(value)
        return result

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation:
        """See `low_rank`."""
        ranks = {n: self.rank for n, v in observed.items() if is_matrix(v) and self.rank < min(matrix(v).shape)}
        return low_rank(observed, ranks)


def low_rank(observed: Mapping[str, Tensor], ranks: Mapping[str, int]) -> Imitation:
    """What an update shows within the row and column spaces of the observed one.

    With U and V the observed singular vectors, the whole gradient G has UᵀG = UᵀĜ and GV = ĜV exactly, since what was
    cut off is orthogonal to both; of the rest nothing is known but that it is smaller. So G goes to
    UUᵀG + GVVᵀ − UUᵀGVVᵀ, which is linear.

    Args:
        observed: name -> tensor.
        ranks: name -> how many singular values were kept, for those that were cut.
    """
    spaces = {}
    for name, rank in ranks.items():
        u, _, v = torch.linalg.svd(matrix(observed[name]).double(), full_matrices=False)
        spaces[name] = u[:, :rank], v[:rank].mT

    def function(update: Tensors) -> Tensors:
        result = dict(update)
        for name, (u, v) in spaces.items():
            value = matrix(update[name])
            left, right = u.to(value), v.to(value)
            rows = left @ (left.mT @ value)
            rest = value - rows
            result[name] = (rows + (rest @ right) @ right.mT).view(update[name].shape)
        return result

    return Imitation(function if spaces else dict, dict.fromkeys(observed, 0.0))


def is_matrix(value: Tensor) -> bool:
    """Whether a tensor is a matrix, or a stack that reads as one."""
    return value.is_floating_point() and value.dim() >= 2 and value.numel() > 0


def matrix(value: Tensor) -> Tensor:
    """``[first dimension, the rest]``."""
    return value.reshape(len(value), -1)
