"""The row space of a batch's last layer: one decomposition, for the label search and for the inversion."""

from fedleak.attacks.row_space.atoms import imagined_atoms, project_features
from fedleak.attacks.row_space.fit import fit, mismatch
from fedleak.attacks.row_space.samples import batch_features, sample_roots
from fedleak.attacks.row_space.search import Found, search
from fedleak.attacks.row_space.space import RowSpace, row_space

__all__ = [
    "Found",
    "RowSpace",
    "batch_features",
    "fit",
    "imagined_atoms",
    "mismatch",
    "project_features",
    "row_space",
    "sample_roots",
    "search",
]
