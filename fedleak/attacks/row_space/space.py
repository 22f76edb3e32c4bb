"""Row-space matching: features and labels of a batch from the gradient of its last layer, when B < C.

The gradient of the last layer, weight and bias side by side, is G = Σ_i r_i [h_i; 1]ᵀ / B with
r_i = softmax(W h_i + b) − e_{y_i}. While B < C its rank is B, so its row space, with orthonormal basis R [d + 1, B],
holds every sample's feature vector: [h_i; 1] = R x_i. The unknowns are B·B coordinates x_i and B labels, against C·B
equations, which single out the true labels even where the model is all but certain of every sample:

    Σ_i r_i x_iᵀ / B = G R        and        (R x_i)_{d+1} = 1.

The columns of that system have the sizes of G's singular values, from 1 down to 1e-6 in trained models. `fit` solves it
by Levenberg–Marquardt with column k divided by max(S_k, ε S_1); `search` anneals ε and looks for the labels, by
exchanging whole samples for entries of a dictionary ("atoms": plausible features with their labels).

All functions take P problems at once, in float64 on any device.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowSpace:
    """P problems of the same size; C classes, rank B.

    Attributes:
        left: ``[P, C, B]``, U.
        singular: ``[P, B]``, S, descending.
        basis: ``[P, D, B]``, R; D = d + 1 with a bias in the layer, else d.
        head: ``[P, C, B]``, [W b] R: logits are ``head @ x``.
        one: ``[P, B]``, last row of R where the layer has a bias, else zeros.
        affine: ``[P]``, what ``one @ x`` must be: 1 with a bias, 0 without.
        noise: ``[P]``, root mean square of an entry of what lies outside of rank B: rounding, or what a defense adds.
    """

    left: Tensor
    singular: Tensor
    basis: Tensor
    head: Tensor
    one: Tensor
    affine: Tensor
    noise: Tensor

    @property
    def target(self) -> Tensor:
        """``[P, C, B]``, G R = U S."""
        return self.left * self.singular[:, None]

    def __getitem__(self, index: Tensor) -> RowSpace:
        """The problems at `index` ``[P']``, repeated where it repeats."""
        return RowSpace(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def whitening(self, floor: Tensor) -> Tensor:
        """``[P, B]``, what column k is multiplied with: 1 / max(S_k, floor·S_1), floor ``[P]``."""
        return 1 / torch.maximum(self.singular, floor[:, None] * self.singular[:, :1]).clamp(min=1e-300)


def row_space(weight: Tensor, bias: Tensor | None, head: Tensor, head_bias: Tensor | None, rank: int) -> RowSpace:
    """Decompose P gradients of the last layer.

    Args:
        weight: ``[P, C, d]``, ∂L/∂W.
        bias: ``[P, C]``, ∂L/∂b; None where the layer has no bias.
        head: ``[P, C, d]``, W.
        head_bias: ``[P, C]``, b.
        rank: the batch size B, at most C and D.
    """
    gradient, layer = weight.double(), head.double()
    if bias is not None and head_bias is not None:
        gradient = torch.cat([gradient, bias.double()[..., None]], dim=2)
        layer = torch.cat([layer, head_bias.double()[..., None]], dim=2)
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    basis = right[:, :rank].transpose(1, 2)
    spare = max((gradient.shape[1] - rank) * (gradient.shape[2] - rank), 1)
    return RowSpace(
        left=left[..., :rank],
        singular=values[:, :rank],
        basis=basis,
        head=layer @ basis,
        one=basis[:, -1] if bias is not None else torch.zeros_like(values[:, :rank]),
        affine=torch.full_like(values[:, 0], float(bias is not None)),
        noise=(values[:, rank:].square().sum(1) / spare).sqrt(),
    )
