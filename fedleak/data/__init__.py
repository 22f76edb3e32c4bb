"""Data sets and the ways to split them over clients."""

from fedleak.data.condensed import condensed
from fedleak.data.datasets import (
    ImageData,
    cifar10,
    cifar100,
    digits,
    fashion_mnist,
    image_folder,
    lfw,
    mnist,
    svhn,
    to_float,
)
from fedleak.data.partition import IID, Biased, Dirichlet, Partitioner, Shards

__all__ = [
    "IID",
    "Biased",
    "Dirichlet",
    "ImageData",
    "Partitioner",
    "Shards",
    "cifar10",
    "cifar100",
    "condensed",
    "digits",
    "fashion_mnist",
    "image_folder",
    "lfw",
    "mnist",
    "svhn",
    "to_float",
]
