"""Data sets and the ways to split them over clients."""

from fedleak.data.datasets import ImageData, digits, to_float
from fedleak.data.partition import IID, Biased, Dirichlet, Partitioner, Shards

__all__ = [
    "IID",
    "Biased",
    "Dirichlet",
    "ImageData",
    "Partitioner",
    "Shards",
    "digits",
    "to_float",
]
