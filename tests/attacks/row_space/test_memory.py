"""Hundreds of classes mean thousands of batches to fit: they are fitted in pieces, which change nothing."""

import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedleak.attacks.row_space import row_space, search

MODULE = sys.modules["fedleak.attacks.row_space.search"]  # of which the package shows the function


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation gave, in bytes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = (v.untyped_storage().nbytes() for v in tree_leaves(result) if isinstance(v, torch.Tensor))
        self.most = max(self.most, *sizes, 0)
        return result


def space_of(classes, batch=8, features=40):
    """A problem whose labels nothing explains, so that the search goes on."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(1, classes, n, generator=generator, dtype=torch.float64) for n in (features, features)]
    gradient = draw[0] - draw[0].mean(dim=1, keepdim=True)
    bias, shift = torch.randn(2, 1, classes, generator=generator, dtype=torch.float64)
    return row_space(gradient, bias, draw[1], shift, batch)


def searched(classes):
    space = space_of(classes)
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(classes).repeat(2).sort().values
    atoms = torch.randn(1, len(labels), 8, generator=generator, dtype=torch.float64)
    return search(space, atoms, labels, seed=0, starts=16, rounds=1, floors=(1.0,))[0]


def test_the_largest_tensor_stays_within_the_budget(monkeypatch):
    monkeypatch.setattr(MODULE, "MANY", 256)
    with Largest() as seen:
        searched(300)
    # Four times 256 batches at once would be 150 MB in one tensor of the normal equations; all 6 × 8 × 299, 2 GB.
    assert seen.most <= 2**26


def test_pieces_give_what_the_whole_gives(monkeypatch):
    whole = searched(12)
    monkeypatch.setattr(MODULE, "MEMORY", 2**20)
    pieces = searched(12)
    assert torch.equal(whole.labels, pieces.labels)
    torch.testing.assert_close(whole.residual, pieces.residual)
