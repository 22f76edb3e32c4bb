"""Half precision: an update rounded to 16-bit floating point (Zhu et al. 2019, DLG, tried fp16)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedleak.defenses.base import Defense, Imitation
from fedleak.errors import UsageError
from fedleak.training import LocalTraining, Tensors

FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class HalfPrecision(Defense):
    """Every element rounded to a 16-bit format and sent as float32.

    It halves the traffic. It protects nothing: the error is a few thousandths of each element (half of that in fp16's
    ten bits of mantissa, eight times as much in bf16's seven), far below what stops an attack.

    Args:
        format: ``float16`` or ``bfloat16``. What is too large for float16 is sent as its largest number.

    Raises:
        UsageError: another format.

    References:
        Zhu, Liu, Han. Deep leakage from gradients. NeurIPS 2019.
    """

    knob: ClassVar[str | None] = "format"

    def __init__(self, format: str = "float16") -> None:
        if format not in FORMATS:
            raise UsageError(f"defense.format={format}: choose one of {', '.join(FORMATS)}")
        self.format = format

    def apply(self, update: Tensors, *, generator: torch.Generator) -> Tensors:
        """Rounded to the nearest number of the format."""
        dtype = FORMATS[self.format]
        most = torch.finfo(dtype).max
        return {
            n: value.clamp(-most, most).to(dtype).to(value.dtype) if value.is_floating_point() else value
            for n, value in update.items()
        }

    def imitate(self, observed: Mapping[str, Tensor], training: LocalTraining) -> Imitation:
        """The update itself, with the rounding of each observed element as noise."""
        return Imitation(dict, {name: rounding(value, FORMATS[self.format]) for name, value in observed.items()})


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard deviation of the error of rounding to a format: that of a uniform draw from the last bit."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(value.abs().clamp_min(info.tiny)))
    return info.eps * torch.exp2(exponent) / 12**0.5
