"""Partitioners: who holds which training images.

A partitioner is any callable ``(labels, clients, generator) -> list of index tensors``. Every client gets at least one
image and no image goes to two clients; IID, Dirichlet and Shards hand out every image.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from fedleak.errors import UsageError


class Partitioner(ABC):
    """Splits a labelled data set over clients. Subclass it in a file of your own and name it by ``_target_``."""

    def __call__(self, labels: Tensor, clients: int, generator: torch.Generator) -> list[Tensor]:
        """Split N images over `clients`.

        Args:
            labels: ``[N]`` int64, at least 0.
            clients: how many clients, at least 1 and at most N.
            generator: the only source of randomness.

        Returns:
            One index tensor a client, int64, ascending, not empty, disjoint from the others'.

        Raises:
            UsageError: there are fewer images than clients, or the split is impossible.
        """
        if isinstance(clients, bool) or not isinstance(clients, int) or clients < 1:
            raise UsageError(f"federation.clients={clients} is impossible; give a whole number above 0")
        if clients > len(labels):
            raise UsageError(
                f"federation.clients={clients} is more than the {len(labels)} training images; "
                f"give at most {len(labels)}, or raise data.limit"
            )
        return [part.sort().values for part in self.split(labels, clients, generator)]

    @abstractmethod
    def split(self, labels: Tensor, clients: int, generator: torch.Generator) -> list[Tensor]:
        """As `__call__`, with the arguments checked and in any order within a client."""


class IID(Partitioner):
    """Images at random, equally many for each client (within one)."""

    def split(self, labels: Tensor, clients: int, generator: torch.Generator) -> list[Tensor]:
        return list(torch.randperm(len(labels), generator=generator).tensor_split(clients))


class Shards(Partitioner):
    """Images sorted by label and cut into shards; each client gets some at random (McMahan et al. 2017).

    Args:
        shards_per_client: shards of each client, and so about the most classes that it holds.

    Raises:
        UsageError: `shards_per_client` is below 1, or there are fewer images than shards.
    """

    def __init__(self, shards_per_client: int = 2) -> None:
        if isinstance(shards_per_client, bool) or not isinstance(shards_per_client, int) or shards_per_client < 1:
            raise UsageError(
                f"partition.shards_per_client={shards_per_client} is impossible; give a whole number above 0"
            )
        self.shards_per_client = shards_per_client

    def split(self, labels: Tensor, clients: int, generator: torch.Generator) -> list[Tensor]:
        count = clients * self.shards_per_client
        if count > len(labels):
            raise UsageError(
                f"partition.shards_per_client={self.shards_per_client} makes {count} shards of {len(labels)} images; "
                f"give at most {len(labels) // clients}"
            )
        shuffled = torch.randperm(len(labels), generator=generator)  # which of a class's images share a shard
        shards = shuffled[labels[shuffled].argsort(stable=True)].tensor_split(count)
        order = torch.randperm(count, generator=generator).view(clients, self.shards_per_client)
        return [torch.cat([shards[shard] for shard in own]) for own in order.tolist()]


class Dirichlet(Partitioner):
    """Each class is split over the clients in proportions from Dir(alpha) (Yurochkin et al. 2019; Hsu et al. 2019).

    A client that would get nothing takes one image from the client that has most.

    Args:
        alpha: concentration; large is close to IID in labels and sizes, small leaves a client few classes.

    Raises:
        UsageError: `alpha` is not a finite number above 0.
    """

    def __init__(self, alpha: float = 0.5) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise UsageError(f"partition.alpha={alpha} is impossible; give a finite number above 0, say 0.5")
        self.alpha = float(alpha)

    def split(self, labels: Tensor, clients: int, generator: torch.Generator) -> list[Tensor]:
        rng = _numpy_generator(generator)
        parts: list[list[Tensor]] = [[] for _ in range(clients)]
        for members in _by_class(labels, generator):
            shares = rng.dirichlet(np.full(clients, self.alpha))
            if not math.isclose(shares.sum(), 1):  # underflow at a tiny alpha, whose limit is one client for a class
                shares = np.eye(clients)[rng.integers(clients)]
            cuts = (shares.cumsum()[:-1] * len(members)).round().astype(int).tolist()
            for part, indices in zip(parts, members.tensor_split(cuts), strict=True):
                part.append(indices)
        result = [torch.cat(part) for part in parts]
        for client in range(clients):
            if len(result[client]) == 0:
                richest = max(range(clients), key=lambda other: len(result[other]))
                given = int(torch.randint(len(result[richest]), (), generator=generator))
                result[client] = result[richest][given : given + 1]
                result[richest] = torch.cat([result[richest][:given], result[richest][given + 1 :]])
        return result


class Biased(Partitioner):
    """The founding study's skew: half of a client's images of one class, a quarter of a second, a quarter at random.

    A client's two classes are drawn at random among those with enough images left, first those that the fewest
    clients have as their main (second) class. The last quarter comes at random from the other classes, or from all if
    there are only two. Shares are exact within one image.

    The skew is kept where classes run out: every client gets the same number of images, the most (in steps of 2%)
    for which the draw works out, and the rest of the data set stays unused. So few clients cannot share out a large
    data set: a client holds at most twice as many images as the class of the median image has.

    Raises:
        UsageError: there is only one class.
    """

    def split(self, labels: Tensor, clients: int, generator: torch.Generator) -> list[Tensor]:
        queues = _by_class(labels, generator)
        if len(queues) < 2:
            raise UsageError("partition=biased needs at least two classes and data has one; choose partition=iid")
        counts = np.array([len(queue) for queue in queues])
        rng = _numpy_generator(generator)
        ascending = np.sort(counts)
        median = int(ascending[np.searchsorted(ascending.cumsum(), len(labels) / 2)])
        size = min(len(labels) // clients, 2 * median)
        while (table := self._draw(counts, clients, size, rng)) is None:
            size -= max(1, size // 50)  # ends at 1 at the latest, which always works out
        starts = table.cumsum(axis=0) - table
        return [
            torch.cat([queue[a : a + n] for queue, a, n in zip(queues, start, row, strict=True)])
            for start, row in zip(starts.tolist(), table.tolist(), strict=True)
        ]

    @staticmethod
    def _draw(counts: np.ndarray, clients: int, size: int, rng: np.random.Generator) -> np.ndarray | None:
        """Images of each client and class, ``[clients, classes]``, `size` a client; None if a class runs out."""
        main, second = (size + 1) // 2, (size // 2 + 1) // 2
        rest = size - main - second
        left = counts.copy()
        table = np.zeros((clients, len(counts)), dtype=np.int64)
        favourites = np.zeros((2, clients), dtype=np.int64)
        for role, wanted in enumerate((main, second)):
            used = np.zeros(len(counts))
            for client in range(clients):
                able = left >= wanted
                able[favourites[:role, client]] = False
                if not able.any():
                    return None
                pick = rng.choice(np.flatnonzero(able & (used == used[able].min())))
                favourites[role, client] = pick
                used[pick] += 1
                left[pick] -= wanted
                table[client, pick] += wanted
        for client in range(clients):
            pool = left.copy()
            if len(counts) > 2:
                pool[favourites[:, client]] = 0
            if pool.sum() < rest:
                return None
            drawn = rng.multivariate_hypergeometric(pool, rest, method="marginals")
            left -= drawn
            table[client] += drawn
        return table


def _by_class(labels: Tensor, generator: torch.Generator) -> list[Tensor]:
    """The indices of every class that occurs, in label order, each shuffled."""
    shuffled = torch.randperm(len(labels), generator=generator)
    return [shuffled[labels[shuffled] == label] for label in labels.unique().tolist()]


def _numpy_generator(generator: torch.Generator) -> np.random.Generator:
    """A numpy generator for the distributions that torch cannot draw from a generator of one's own."""
    return np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator)))
