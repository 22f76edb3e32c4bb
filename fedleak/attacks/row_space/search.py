"""The search for a batch's labels: whole samples are exchanged for atoms, at falling whitening, and fitted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedleak.attacks.row_space.fit import fit
from fedleak.attacks.row_space.space import RowSpace
from fedleak.seeding import plain_generator


@dataclass(frozen=True)
class Found:
    """What `search` ends with for one problem, best first.

    Attributes:
        labels: ``[H, B]`` int64, distinct label multisets, each ascending.
        residual: ``[H]``, sums of squares.
        features: ``[H, B, D]``, the samples' feature vectors, in the order of `labels`.
    """

    labels: Tensor
    residual: Tensor
    features: Tensor


class _Pool:
    """The best coordinates found for each label multiset of one problem."""

    def __init__(self) -> None:
        self.entries: dict[tuple[int, ...], tuple[float, Tensor, Tensor]] = {}
        self.tried: set[tuple[tuple[int, ...], float]] = set()

    def add(self, x: Tensor, labels: Tensor, total: Tensor) -> None:
        ordered, place = labels.sort(dim=1)
        keys, totals = ordered.tolist(), total.tolist()
        for k, (key, value) in enumerate(zip(keys, totals, strict=True)):
            name = tuple(key)
            if value < self.entries.get(name, (float("inf"),))[0]:
                self.entries[name] = (value, x[k][place[k]], ordered[k])

    def best(self, count: int) -> list[tuple[float, Tensor, Tensor]]:
        return sorted(self.entries.values(), key=lambda entry: entry[0])[:count]

    def untried(self, count: int) -> list[tuple[float, Tensor, Tensor]]:
        fresh: list[tuple[float, Tensor, Tensor]] = []
        for value, x, labels in self.best(4 * count):
            name = (tuple(labels.tolist()), round(value, 12))
            if name not in self.tried and len(fresh) < count:
                self.tried.add(name)
                fresh.append((value, x, labels))
        return fresh


def search(
    space: RowSpace,
    atoms: Tensor,
    atom_labels: Tensor,
    *,
    seed: int,
    starts: int = 256,
    rounds: int = 6,
    tops: int = 6,
    noise: Tensor | None = None,
    floors: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.01),
    last_floor: float = 0.003,
    solved: float = 1e-8,
) -> list[Found]:
    """Look for the labels and features of P batches.

    Starts are random batches of atoms. At each level of the annealing every sample of every start is exchanged for the
    atom that fits best beside the others, then `fit` moves the coordinates, and the better half goes on. In the end
    each single label of the best few is changed to each other class, with the atom that fits best there, and fitted
    again, round after round, until a residual falls below `solved`.

    Args:
        space: P problems.
        atoms: ``[P, A, B]``, coordinates of plausible samples.
        atom_labels: ``[A]`` int64 their labels, ascending.
        seed: decides the starts, the same for every problem.
        starts: starting batches.
        rounds: rounds of label changes at most.
        tops: label multisets changed in a round.
        noise: ``[P]``, standard deviation of the error in an entry of the gradient, where it is more than rounding.
        floors: ε of the levels.
        last_floor: ε of the residuals that are compared; raised where noise would fill them.
        solved: the residual that ends the search; raised to what noise leaves.
    """
    problems, classes, rank = space.head.shape
    device = atoms.device
    noise = torch.zeros_like(space.affine) if noise is None else noise.to(space.affine)
    relative = noise / space.singular[:, 0].clamp(min=1e-300)
    last = (1e3 * relative).clamp(min=last_floor, max=0.3)
    enough = (10 * classes * rank * (relative / last).square()).clamp(min=solved).tolist()
    generator = plain_generator(seed)
    drawn = torch.randint(len(atom_labels), (starts, rank), generator=generator).to(device)
    x, labels = atoms[:, drawn], atom_labels[drawn].expand(problems, -1, -1)
    for level, value in enumerate(floors):
        floor = last.clamp(min=value)
        for _ in range(3 if level == 0 else 2):
            order = torch.randperm(rank, generator=generator).tolist()
            x, labels = _exchange(space, x, labels, atoms, atom_labels, floor, order)
        x, total = _fit_all(space, x, labels, floor, 15)
        keep = total.argsort(dim=1)[:, : max(min(64, starts), x.shape[1] // 2)]
        x, labels = _pick(x, keep), _pick(labels, keep)
    x, total = _fit_all(space, x, labels, last, 15)
    pools = [_Pool() for _ in range(problems)]
    for p, pool in enumerate(pools):
        pool.add(x[p], labels[p], total[p])
    for _ in range(rounds):
        waiting = [p for p, pool in enumerate(pools) if not pool.best(1)[0][0] < enough[p]]
        work = {p: top for p in waiting if (top := pools[p].untried(tops))}
        if not work:
            break
        for p, top in work.items():
            some, ends = space[torch.tensor([p], device=device)], last[p : p + 1]
            x, labels = _one_change(some, top, atoms[p], atom_labels, ends)
            x, labels = x[None], labels[None]
            for steps, kept in ((2, MANY), (6, 64)) if x.shape[1] > 2 * MANY else ((8, 64),):
                x, total = _fit_all(some, x, labels, ends, steps)
                keep = total.argsort(dim=1)[:, :kept]
                x, labels = _pick(x, keep), _pick(labels, keep)
            x, total = _fit_all(some, x, labels, ends, 30)
            pools[p].add(x[0], labels[0], total[0])
    found = []
    for p, pool in enumerate(pools):
        values, rows, names = zip(*pool.best(64), strict=True)
        features = torch.stack(rows) @ space.basis[p].T
        found.append(Found(torch.stack(names), torch.tensor(values, dtype=torch.float64), features))
    return found


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """``values[p, index[p, k]]`` for values ``[P, K, ...]``."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]


MANY = 1024
"""Changed batches that are fitted to the end. Of more than twice as many only four times as many are fitted at all,
those that begin best, and those that are best after two steps go on."""

MEMORY = 2**28
"""Bytes that a piece of the work may take, about; with many classes there are thousands of batches to fit at once."""
CACHED = 2**25
"""The same on a processor, whose caches hold so much: a third of the time."""


def _fit_all(space: RowSpace, x: Tensor, labels: Tensor, floor: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """`fit` on K batches for each problem, so many at a time: x ``[P, K, B, B]``, labels ``[P, K, B]``."""
    problems, starts = labels.shape[:2]
    classes, rank = space.head.shape[1:]
    small = replace(space, basis=space.basis[:, :0])  # would be repeated for each batch, and is of no use here
    most = min(MEMORY, CACHED) if x.device.type == "cpu" else MEMORY
    size = max(1, most // (8 * 6 * rank * (rank * classes + rank**3)))
    which = torch.arange(problems, device=x.device).repeat_interleave(starts)
    found = []
    for part, some, names in zip(*(v.split(size) for v in (which, x.flatten(0, 1), labels.flatten(0, 1))), strict=True):
        truth = one_hot(names, classes).to(x.dtype)
        found.append(fit(small[part], some, truth, floor=floor[part], steps=steps))
    moved, total = (torch.cat(each) for each in zip(*found, strict=True))
    return moved.unflatten(0, (problems, starts)), total.view(problems, starts)


def _contributions(space: RowSpace, x: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """``[P, A, C·B]``, what each sample alone adds to the whitened gradient: r xᵀ / B."""
    error = (x @ space.head.transpose(1, 2)).softmax(dim=2) - one_hot(labels, space.head.shape[1]).to(x.dtype)
    rank = x.shape[2]
    return (error[..., None] * (x * scale[:, None])[..., None, :] / rank).flatten(2)


def _exchange(
    space: RowSpace, x: Tensor, labels: Tensor, atoms: Tensor, atom_labels: Tensor, floor: Tensor, order: list[int]
) -> tuple[Tensor, Tensor]:
    """Exchange sample after sample of every start for the atom that fits best beside the others, if it fits better."""
    scale = space.whitening(floor)
    all_labels = atom_labels.expand(len(atoms), -1)
    pieces = _contributions(space, atoms, all_labels, scale)
    apart = (atoms @ space.one[..., None])[..., 0] - space.affine[:, None]
    own = pieces.square().sum(dim=2) + apart.square()
    target = (space.target * scale[:, None]).flatten(1)
    x, labels = x.clone(), labels.clone()
    for i in order:
        rest = -target[:, None].expand(-1, x.shape[1], -1)
        for j in range(x.shape[2]):
            if j != i:
                rest = rest + _contributions(space, x[:, :, j], labels[:, :, j], scale)
        mine = _contributions(space, x[:, :, i], labels[:, :, i], scale)
        away = (x[:, :, i] @ space.one[..., None])[..., 0] - space.affine[:, None]
        now = (mine.square() + 2 * mine * rest).sum(dim=2) + away.square()
        cost, pick = (2 * rest @ pieces.transpose(1, 2) + own[:, None]).min(dim=2)
        better = cost < now
        x[:, :, i] = torch.where(better[..., None], _pick(atoms, pick), x[:, :, i])
        labels[:, :, i] = torch.where(better, atom_labels[pick], labels[:, :, i])
    return x, labels


def _one_change(
    space: RowSpace,
    tops: list[tuple[float, Tensor, Tensor]],
    atoms: Tensor,
    atom_labels: Tensor,
    floor: Tensor,
) -> tuple[Tensor, Tensor]:
    """Every batch with one label changed, its sample being the atom of the new label that fits best."""
    scale = space.whitening(floor)
    pieces = _contributions(space, atoms[None], atom_labels[None], scale)[0]
    apart = (atoms @ space.one[0]) - space.affine[0]
    own = pieces.square().sum(dim=1) + apart.square()
    groups = [(atom_labels == label).nonzero()[:, 0] for label in range(space.head.shape[1])]
    target = (space.target * scale[:, None])[0].flatten()
    changed, names, ranks = [], [], []
    for _, x, labels in tops:
        parts = _contributions(space, x[None], labels[None], scale)[0]
        off = ((x @ space.one[0]) - space.affine[0]).square()
        for i in range(len(x)):
            rest = parts.sum(dim=0) - parts[i] - target
            cost = own + 2 * pieces @ rest + (rest.square().sum() + off.sum() - off[i])
            for label, group in enumerate(groups):
                if label == int(labels[i]) or len(group) == 0:
                    continue
                best = group[cost[group].argmin()]
                other, name = x.clone(), labels.clone()
                other[i], name[i] = atoms[best], label
                changed.append(other)
                names.append(name)
                ranks.append(cost[best])
    if len(ranks) > 4 * MANY:
        kept = torch.stack(ranks).argsort()[: 4 * MANY].sort().values.tolist()
        changed, names = [changed[k] for k in kept], [names[k] for k in kept]
    return torch.stack(changed), torch.stack(names)
