"""Atoms: plausible features with their labels, as coordinates in a row space; the search's dictionary."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.attacks.row_space.space import RowSpace
from fedleak.seeding import plain_generator


def project_features(space: RowSpace, features: Tensor, logits: Tensor) -> Tensor:
    """Coordinates whose feature vectors, logits and constant are nearest to those given, ``[P, A, B]``.

    Args:
        space: P problems.
        features: ``[P, A, D]``, feature vectors, with a last entry of 1 where the layer has a bias.
        logits: ``[P, A, C]``, the logits there.
    """
    rows = torch.cat([space.basis, space.head, 10 * space.one[:, None]], dim=1)
    given = torch.cat([features, logits, 10 * space.affine[:, None, None].expand(-1, features.shape[1], 1)], dim=2)
    result: Tensor = given @ torch.linalg.pinv(rows).transpose(1, 2)
    return result


def imagined_atoms(
    space: RowSpace, centre: Tensor, count: int, seed: int, *, stiffness: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Atoms for an attacker without data: coordinates with logits such as a trained model gives.

    Labels are drawn uniformly; log-odds of the label uniformly from -2 to 11, so that doubtful and certain samples all
    occur; the other logits from normal laws of several widths. Coordinates are those nearest to `centre` with them.

    Args:
        space: P problems.
        centre: ``[P, B]``, coordinates of the model's mean feature (`project_features` of dummy inputs).
        count: atoms A.
        seed: decides the draws, the same for every problem.
        stiffness: weight of staying near the centre against reaching the logits.

    Returns:
        ``[P, A, B]`` coordinates and ``[A]`` labels, ascending.
    """
    generator = plain_generator(seed)
    problems, classes, rank = space.head.shape
    labels = torch.randint(classes, (count,), generator=generator).sort().values
    width = 1 + 4 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    logits = torch.randn(count, classes, generator=generator, dtype=torch.float64) * width
    odds = 13 * torch.rand(count, generator=generator, dtype=torch.float64) - 2
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(dim=1)
    logits = logits.scatter(1, labels[:, None], (others + odds)[:, None])
    logits = (logits - logits.mean(dim=1, keepdim=True)).to(space.head.device)
    head = space.head - space.head.mean(dim=1, keepdim=True)
    eye = torch.eye(rank, dtype=head.dtype, device=head.device).expand(problems, -1, -1)
    rows = torch.cat([head, stiffness * eye, 30 * space.one[:, None]], dim=1)
    given = torch.cat(
        [
            logits.expand(problems, -1, -1),
            stiffness * centre[:, None].expand(-1, count, -1),
            30 * space.affine[:, None, None].expand(-1, count, 1),
        ],
        dim=2,
    )
    return given @ torch.linalg.pinv(rows).transpose(1, 2), labels.to(space.head.device)
