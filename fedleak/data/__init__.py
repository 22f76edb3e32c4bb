"""Data sets and the ways to split them over clients."""

from fedleak.data.datasets import (
    ImageData,
    digits,
    to_float,
)

__all__ = [
    "ImageData",
    "digits",
    "to_float",
]
