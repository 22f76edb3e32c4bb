"""Row-space matching: features and labels of a batch from the gradient of its last layer, when B < C.

The gradient of the last layer, weight and bias side by side, is G = Σ_i r_i [h_i; 1]ᵀ / B with
r_i = softmax(W h_i + b) − e_{y_i}. While B < C its rank is B, so its row space, with orthonormal basis R [d + 1, B],
holds every sample's feature vector: [h_i; 1] = R x_i. The unknowns are B·B coordinates x_i and B labels, against C·B
equations, which single out the true labels even where the model is all but certain of every sample:

    Σ_i r_i x_iᵀ / B = G R        and        (R x_i)_{d+1} = 1.

The columns of that system have the sizes of G's singular values, from 1 down to 1e-6 in trained models. `fit` solves it
by Levenberg–Marquardt with column k divided by max(S_k, ε S_1); `search` anneals ε and looks for the labels, by
exchanging whole samples for entries of a dictionary ("atoms": plausible features with their labels).

All functions take P problems at once, in float64 on any device.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedleak.seeding import plain_generator


@dataclass(frozen=True)
class RowSpace:
    """P problems of the same size; C classes, rank B.

    Attributes:
        target: ``[P, C, B]``, G R = U S.
        singular: ``[P, B]``, S, descending.
        basis: ``[P, D, B]``, R; D = d + 1 with a bias in the layer, else d.
        head: ``[P, C, B]``, [W b] R: logits are ``head @ x``.
        one: ``[P, B]``, last row of R where the layer has a bias, else zeros.
        affine: ``[P]``, what ``one @ x`` must be: 1 with a bias, 0 without.
    """

    target: Tensor
    singular: Tensor
    basis: Tensor
    head: Tensor
    one: Tensor
    affine: Tensor

    def __getitem__(self, index: Tensor) -> RowSpace:
        """The problems at `index` ``[P']``, repeated where it repeats."""
        return RowSpace(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def whitening(self, floor: Tensor) -> Tensor:
        """``[P, B]``, what column k is multiplied with: 1 / max(S_k, floor·S_1), floor ``[P]``."""
        return 1 / torch.maximum(self.singular, floor[:, None] * self.singular[:, :1]).clamp(min=1e-300)


def row_space(weight: Tensor, bias: Tensor | None, head: Tensor, head_bias: Tensor | None, rank: int) -> RowSpace:
    """Decompose P gradients of the last layer.

    Args:
        weight: ``[P, C, d]``, ∂L/∂W.
        bias: ``[P, C]``, ∂L/∂b; None where the layer has no bias.
        head: ``[P, C, d]``, W.
        head_bias: ``[P, C]``, b.
        rank: the batch size B, at most C - 1.
    """
    gradient, layer = weight.double(), head.double()
    if bias is not None and head_bias is not None:
        gradient = torch.cat([gradient, bias.double()[..., None]], dim=2)
        layer = torch.cat([layer, head_bias.double()[..., None]], dim=2)
    left, singular, right = torch.linalg.svd(gradient, full_matrices=False)
    singular, basis = singular[:, :rank], right[:, :rank].transpose(1, 2)
    one = basis[:, -1] if bias is not None else torch.zeros_like(singular)
    affine = torch.full_like(singular[:, 0], float(bias is not None))
    return RowSpace(left[..., :rank] * singular[:, None], singular, basis, layer @ basis, one, affine)


@dataclass(frozen=True)
class Mismatch:
    """How far coordinates are from solving their problems.

    Attributes:
        probabilities: ``[P, B, C]``.
        error: ``[P, B, C]``, r = probabilities − one-hot labels.
        gradient: ``[P, C, B]``, the whitened mismatch of the gradient.
        affine: ``[P, B]``, of the constant.
        total: ``[P]``, sum of squares.
    """

    probabilities: Tensor
    error: Tensor
    gradient: Tensor
    affine: Tensor
    total: Tensor


def mismatch(space: RowSpace, x: Tensor, truth: Tensor, scale: Tensor) -> Mismatch:
    """Compare P batches with their problems.

    Args:
        space: P problems.
        x: ``[P, B, B]``, row i the coordinates of sample i.
        truth: ``[P, B, C]``, one-hot labels.
        scale: ``[P, B]``, see `RowSpace.whitening`.
    """
    probabilities = (x @ space.head.transpose(1, 2)).softmax(dim=2)
    error = probabilities - truth
    gradient = (error.transpose(1, 2) @ x / x.shape[1] - space.target) * scale[:, None]
    affine = (x @ space.one[..., None])[..., 0] - space.affine[:, None]
    total = gradient.square().sum(dim=(1, 2)) + affine.square().sum(dim=1)
    return Mismatch(probabilities, error, gradient, affine, total)


def fit(space: RowSpace, x: Tensor, truth: Tensor, *, floor: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Levenberg–Marquardt on the coordinates of P batches with fixed labels.

    Args:
        space: P problems.
        x: ``[P, B, B]``, starts.
        truth: ``[P, B, C]``, one-hot labels.
        floor: ``[P]``, ε of the whitening.
        steps: iterations.

    Returns:
        ``[P, B, B]`` and the sum of squares there, ``[P]``.
    """
    scale = space.whitening(floor)
    damping = torch.full_like(scale[:, 0], 1e-2)
    at = mismatch(space, x, truth, scale)
    for _ in range(steps):
        matrix, slope = _normal_equations(space, x, at, scale)
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        lift = damping[:, None] * (diagonal + 1e-10 * diagonal.amax(dim=1, keepdim=True))
        factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed(lift))
        moved = x - torch.cholesky_solve(slope, factor).view_as(x)
        there = mismatch(space, moved, truth, scale)
        better = (there.total < at.total) & (failed == 0)  # NaN compares false
        x = torch.where(better[:, None, None], moved, x)
        at = Mismatch(
            *(
                torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old)
                for new, old in zip(vars(there).values(), vars(at).values(), strict=True)
            )
        )
        damping = torch.where(better, damping * 0.3, damping * 4).clamp(1e-12, 1e6)
    return x, at.total


def _normal_equations(space: RowSpace, x: Tensor, at: Mismatch, scale: Tensor) -> tuple[Tensor, Tensor]:
    """JᵀJ ``[P, B·B, B·B]`` and Jᵀe ``[P, B·B, 1]`` of the sum of squares, unknowns in the order of x's memory.

    J is never built: the derivative of r_i x_iᵀ is D_i[c, l] x_i[k] + r_i[c] δ_kl, with D_i the derivative of r_i,
    and its products factor.
    """
    problems, batch, rank = x.shape
    weight = scale.square()
    mean = at.probabilities @ space.head
    slopes = at.probabilities[..., None] * (space.head[:, None] - mean[:, :, None])  # D: [P, i, c, l]
    flat = slopes.permute(0, 2, 1, 3).reshape(problems, -1, batch * rank)
    weighted = x * weight[:, None]
    matrix = (flat.transpose(1, 2) @ flat).view(problems, batch, rank, batch, rank)
    matrix = matrix * (weighted @ x.transpose(1, 2))[:, :, None, :, None]
    cross = (flat.transpose(1, 2) @ at.error.transpose(1, 2)).view(problems, batch, rank, batch, 1)
    cross = cross * weighted[:, :, None, None]
    matrix = matrix + cross + cross.permute(0, 3, 4, 1, 2)
    eye = torch.diag_embed(weight)[:, None, :, None]
    matrix = (matrix + (at.error @ at.error.transpose(1, 2))[:, :, None, :, None] * eye) / batch**2
    same = torch.eye(batch, dtype=x.dtype, device=x.device)[None, :, None, :, None]
    matrix = matrix + same * (space.one[:, :, None] * space.one[:, None])[:, None, :, None]
    whitened = at.gradient * scale[:, None]
    slope = torch.einsum("picl,pic->pil", slopes, x @ whitened.transpose(1, 2)) + at.error @ whitened
    slope = slope / batch + at.affine[..., None] * space.one[:, None]
    return matrix.reshape(problems, batch * rank, batch * rank), slope.reshape(problems, -1, 1)


def project_features(space: RowSpace, features: Tensor, logits: Tensor) -> Tensor:
    """Coordinates whose feature vectors, logits and constant are nearest to those given, ``[P, A, B]``.

    Args:
        space: P problems.
        features: ``[P, A, D]``, feature vectors, with a last entry of 1 where the layer has a bias.
        logits: ``[P, A, C]``, the logits there.
    """
    rows = torch.cat([space.basis, space.head, 10 * space.one[:, None]], dim=1)
    given = torch.cat([features, logits, 10 * space.affine[:, None, None].expand(-1, features.shape[1], 1)], dim=2)
    return given @ torch.linalg.pinv(rows).transpose(1, 2)


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
            x, total = _fit_all(some, x[None], labels[None], ends, 8)
            keep = total.argsort(dim=1)[:, :64]
            x, labels = _pick(x, keep), _pick(labels[None], keep)
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


def _fit_all(space: RowSpace, x: Tensor, labels: Tensor, floor: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """`fit` on K batches for each problem: x ``[P, K, B, B]``, labels ``[P, K, B]``."""
    problems, starts = labels.shape[:2]
    each = space[torch.arange(problems, device=x.device).repeat_interleave(starts)]
    truth = one_hot(labels.flatten(0, 1), space.head.shape[1]).to(x.dtype)
    x, total = fit(each, x.flatten(0, 1), truth, floor=floor.repeat_interleave(starts), steps=steps)
    return x.unflatten(0, (problems, starts)), total.view(problems, starts)


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
    changed, names = [], []
    for _, x, labels in tops:
        parts = _contributions(space, x[None], labels[None], scale)[0]
        for i in range(len(x)):
            cost = own + 2 * pieces @ (parts.sum(dim=0) - parts[i] - target)
            for label, group in enumerate(groups):
                if label == int(labels[i]) or len(group) == 0:
                    continue
                other, name = x.clone(), labels.clone()
                other[i], name[i] = atoms[group[cost[group].argmin()]], label
                changed.append(other)
                names.append(name)
    return torch.stack(changed), torch.stack(names)
