"""Random streams that depend on what they are for, never on what ran before them.

New code takes `generator`. The others are the streams that published tables were drawn from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed decided by `parts`, such as ``derive_seed(seed, "client", partition, round)``."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A fresh CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def plain_generator(seed: int) -> torch.Generator:
    """A fresh CPU generator seeded by the number itself: equal seeds give equal draws whatever they are for."""
    return torch.Generator().manual_seed(seed)


def mixed_generator(*numbers: int) -> torch.Generator:
    """A fresh CPU generator seeded by whole numbers, mixed by numpy's `SeedSequence`."""
    mixed = np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, np.uint64)[0]
    return plain_generator(int(mixed >> np.uint64(1)))


def numpy_generator(seed: int) -> np.random.Generator:
    """A fresh generator of numpy's."""
    return np.random.default_rng(seed)


@contextmanager
def global_draws(seed: int) -> Iterator[None]:
    """Seed what modules draw from on their own (initialisation, dropout) on the CPU, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
