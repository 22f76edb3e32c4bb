"""Whether clients' images can be normalised as stated: level and contrast of what the model saw, read off updates.

How large a layer's weight gradient is beside its bias's goes with the size of its inputs; the first layer's own tells
the images' level, the last layer's the features' mean and, class by class, their scatter; BatchNorm's running
statistics those of the first layer. A regression on made-up images, normalised in many ways, reads level and contrast
of the normalised images off them. Under each usual normalisation that is a level and a contrast of the images
themselves, and some of these no images have, or few.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedleak.attacks.base import Knowledge
from fedleak.attacks.labels.last_layer import LastLayer, find_last_layer
from fedleak.audit.checks import CONSISTENT, CONTRADICTS, UNKNOWN, Check
from fedleak.audit.made_up import made_up_images
from fedleak.audit.preflight import Preflight
from fedleak.audit.shapes import NORMALIZATIONS
from fedleak.capture import Observation
from fedleak.local_update import local_update
from fedleak.seeding import plain_generator
from fedleak.training import LocalTraining

Normalization = tuple[list[float], list[float]]
"""Mean and standard deviation, one number a channel or one for all, on the [0, 1] scale."""
PLAIN: Normalization = ([0.0], [1.0])
"""None."""
_HALF: Normalization = ([0.5], [0.5])
MARGIN = 1.5
"""Log-likelihood by which another normalisation must be better."""
REAL = (0.15, 0.1)
"""What real images' updates are read worse than made-up ones', level and log contrast."""
IMAGES = (
    (0.6, (0.46, 0.08), (0.24, 0.16)),
    (0.3, (0.18, 0.08), (0.32, 0.14)),
    (0.1, (0.45, 0.22), (0.20, 0.40)),
)
"""Photographs, strokes on dark, and whatever else: share, level and contrast in [0, 1], each with its spread (that of
the contrast is of its logarithm)."""
UPDATES = 4
"""Updates that are looked at together."""
KINDS = 240
"""Kinds of made-up images."""
STEPS = 10
"""Local steps up to which a change is still much like a gradient where it began."""


@dataclass(frozen=True)
class Look:
    """What updates tell of their images' normalisation.

    Attributes:
        check: the verdict on what was stated.
        best: the usual one that fits best.
        behind: by how much log-likelihood each is behind it, in the order of `usual`.
    """

    check: Check
    best: Normalization
    behind: tuple[float, ...] = ()


def usual(channels: int, stated: Normalization | None = None) -> list[Normalization]:
    """The normalisations to tell apart: what is stated, and the usual ones for so many channels."""
    own = [stated] if stated is not None else []
    known: list[Normalization] = [n for n in NORMALIZATIONS if len(n[0]) == channels or n in (PLAIN, _HALF)]
    return own + [n for n in known if not any(_alike(n, other) for other in own)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _centre(one: Normalization, other: Normalization) -> float:
    """How far two normalisations' centres are apart, in standard deviations."""
    return abs(_mean(one[0]) - _mean(other[0])) / min(_mean(one[1]), _mean(other[1]))


def _alike(one: Normalization, other: Normalization) -> bool:
    """Whether two are nearly the same."""
    return _centre(one, other) < 0.6 and abs(math.log(_mean(one[1]) / _mean(other[1]))) < 0.35


def look(
    preflights: Sequence[Preflight], plain: nn.Module, knowledge: Knowledge, stated: Normalization | None, *, seed: int
) -> Look | None:
    """Which normalisation a federation's updates fit.

    Args:
        preflights: its updates, those of its first rounds first.
        plain: the model, that takes normalised images.
        knowledge: its images and classes.
        stated: what is held to be true; None if nobody says.
        seed: decides the made-up images.

    Returns:
        None where no update can be looked at: of other optimisers than SGD, noisy, of many steps.
    """
    open_ = [p.observation for p in preflights if _readable(p)]
    if not open_:
        return None
    first = min(o.round for o in open_ if o is not None)
    seen = [o for o in open_ if o is not None and o.round == first][:UPDATES]
    ways = usual(knowledge.image_shape[0], stated)
    reader = _Reader(plain, knowledge, seen, seed)
    read = torch.stack([reader.read(o) for o in seen]).mean(dim=0)
    # Updates share their images' kind, and so the error: more of them make it no smaller.
    error = (reader.error.square() + torch.tensor(REAL).square()).sqrt()
    scores = [_likelihood(read, error, way) for way in ways]
    behind = tuple(max(scores) - value for value in scores)
    best = ways[behind.index(0.0)]
    return Look(verdict(ways, behind, best, stated), best, behind)


def with_look(preflights: Sequence[Preflight], found: Look | None) -> list[Preflight]:
    """The preflights with what was found of the images' normalisation."""
    if found is None:
        return list(preflights)
    return [p if p.observation is None else replace(p, checks=(*p.checks, found.check)) for p in preflights]


def _readable(p: Preflight) -> bool:
    o = p.observation
    if o is None or p.noise is not None or o.training.steps is None or o.training.steps > STEPS:
        return False
    optimizer = o.training.optimizer
    return o.training.payload == "gradient" or optimizer is None or hasattr(optimizer, "momentum")


def verdict(
    ways: Sequence[Normalization], behind: Sequence[float], best: Normalization, stated: Normalization | None
) -> Check:
    """What to say of `stated`, the first of `ways` unless it is None, each `behind` the best by so much."""
    name = "normalisation"
    near = [way for way, gap in zip(ways, behind, strict=True) if gap < MARGIN]
    if stated is None:
        words = " or ".join(told(way) for way in near)
        return Check(name, UNKNOWN, f"nobody says how images are normalised; the update looks like {words}")
    if behind[0] > MARGIN:
        words = f"{told(stated)} was stated, and the update looks like images normalised by {told(best)}"
        return Check(name, CONTRADICTS, f"{words}; state --normalize")
    others = [way for way in near[1:] if not _alike(way, stated)] if near and near[0] == stated else [best]
    if others:
        words = " or ".join(told(way) for way in others)
        return Check(name, UNKNOWN, f"{told(stated)} is possible, and so is {words}")
    return Check(name, CONSISTENT, f"the update looks like images normalised by {told(stated)}, as stated")


def told(way: Normalization) -> str:
    """A normalisation as ``--normalize`` takes it."""
    return "/".join(",".join(f"{v:g}" for v in values) for values in way) if way != PLAIN else "0/1 (none)"


class _Reader:
    """Reads level and contrast of normalised images off updates, in the model of one round.

    A kernel ridge regression on the traits of made-up images' updates, of many levels and contrasts.
    """

    def __init__(self, plain: nn.Module, knowledge: Knowledge, seen: Sequence[Observation], seed: int) -> None:
        observation = seen[0]
        self._layer, self._seen = find_last_layer(knowledge), observation
        self._pairs = _pairs(observation.parameters)
        self._first = self._pairs[:1]
        heavy = sum(p.numel() for p in plain.parameters()) > 3_000_000
        size, kinds = min(_samples(observation), 8 if heavy else 32), KINDS // 3 if heavy else KINDS
        images = _normalised(kinds, size, knowledge.image_shape, seed)
        training = LocalTraining(
            payload="gradient",
            batch_size=size,
            local_steps=1,
            epochs=1,
            training_mode=observation.training.training_mode,
        )
        self._norm, self._new = "", 0.0
        for name, module in plain.named_modules():
            sent = f"{name}.running_mean" in observation.buffers
            if isinstance(module, nn.BatchNorm2d) and module.momentum and sent and not self._norm:
                self._norm, self._new = name, module.momentum
        self._guess = _mean_guess(plain, observation, images[: kinds // 8].flatten(0, 1))
        labels = self._labels(seen, kinds, size, seed)
        images = _alike_by_class(images, labels, seed)
        self._truth = _level_and_contrast(images)
        rows: list[tuple[Tensor, Tensor]] = []
        for own, targets in zip(images, labels, strict=True):
            done = local_update(plain, observation.parameters, dict(observation.start_buffers), own, targets, training)
            if not rows:  # before a BatchNorm, biases have no gradient but rounding
                self._pairs = [(w, b) for w, b in self._pairs if done.update[b].norm() > 1e-4 * done.update[w].norm()]
            rows.append(self._traits(done.update, done.buffers, 1, size))
        self._fit(rows)

    def _labels(self, seen: Sequence[Observation], kinds: int, size: int, seed: int) -> Tensor:
        """``[kinds, size]``: made-up images have the labels of the updates, one after the other, as far as known."""
        generator = plain_generator(seed)
        if self._layer.bias is None:
            return torch.randint(len(self._guess), (kinds, size), generator=generator)
        shares = torch.stack([_wanted(self._gradient(o), self._layer, self._guess, _samples(o)) for o in seen])
        shares = shares.clamp(min=0) + 1e-9
        return torch.stack([_drawn(shares[kind % len(seen)], size, generator) for kind in range(kinds)])

    def _gradient(self, o: Observation) -> dict[str, Tensor]:
        """An update's mean gradient; where its scale is not known, as if a class were absent."""
        gradient = dict(o.gradient())
        if o.training.scale is None and self._layer.bias is not None:  # that has its probability
            factor = float((gradient[self._layer.bias].double() / self._guess).max().clamp(min=1e-30))
            gradient = {name: value / factor for name, value in gradient.items()}
        return gradient

    def _traits(
        self, gradient: Mapping[str, Tensor], buffers: Mapping[str, Tensor], steps: int, samples: int
    ) -> tuple[Tensor, Tensor]:
        """Numbers that go with level and contrast, ``[S]``; and the mean features."""
        plain = []
        for weight, bias in self._pairs:
            plain += [_log_norm(gradient[weight]) - _log_norm(gradient[bias]), *_spectrum(gradient[weight])]
        if self._first and self._pairs[:1] == self._first and gradient[self._first[0][0]].dim() == 4:
            plain += _levels(*(gradient[name].double() for name in self._pairs[0]))
        vector = _features(gradient, self._layer)
        plain.append(_log_norm(vector))
        if self._layer.bias is not None:
            plain += _scatter(gradient, self._layer, vector, self._guess, samples)
        if self._norm:
            plain += self._statistics(buffers, steps)
        return torch.tensor(plain, dtype=torch.float64), vector

    def _statistics(self, buffers: Mapping[str, Tensor], steps: int) -> list[float]:
        """Mean and log variance of the first BatchNorm's inputs, off its running statistics before and after."""
        kept = (1 - self._new) ** steps
        mean, spread = (
            (buffers[f"{self._norm}.{name}"].double() - kept * self._seen.start_buffers[f"{self._norm}.{name}"])
            / (1 - kept)
            for name in ("running_mean", "running_var")
        )
        return [*mean[:8].tolist(), *spread[:8].clamp(min=1e-9).log().tolist()]

    def _fit(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        vectors = torch.stack([vector for _, vector in rows])
        self._size, self._centre = float(vectors.norm(dim=1).median()), vectors.mean(dim=0)
        self._axes = torch.linalg.svd(vectors - self._centre, full_matrices=False).Vh[:16].T
        joined = torch.stack([self._joined(*row) for row in rows])
        self._mean, self._spread = joined.mean(dim=0), joined.std(dim=0) + 1e-9
        self._known, offset = (joined - self._mean) / self._spread, self._truth.mean(dim=0)
        kernel, best = _kernel(self._known, self._known), math.inf
        for ridge in (0.003, 0.01, 0.03, 0.1, 0.3):
            inverse = torch.linalg.inv(kernel + ridge * torch.eye(len(kernel), dtype=kernel.dtype))
            weights = inverse @ (self._truth - offset)
            left_out = (weights / inverse.diagonal()[:, None]).square().mean(dim=0)
            if float(left_out.sum()) < best:
                best, self._weights, self.error = float(left_out.sum()), weights, left_out.sqrt()

    def _joined(self, plain: Tensor, vector: Tensor) -> Tensor:
        return torch.cat([plain, (vector - self._centre) @ self._axes / self._size])

    def read(self, o: Observation) -> Tensor:
        """``[2]``: level, and logarithm of the contrast."""
        found = self._traits(self._gradient(o), o.buffers, o.training.steps or 1, _samples(o))
        traits = self._joined(*found)
        traits = ((traits - self._mean) / self._spread).clamp(-4, 4)  # unlike any: no further than the edge
        return (_kernel(traits[None], self._known) @ self._weights)[0] + self._truth.mean(dim=0)


def _normalised(kinds: int, size: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """``[kinds, size, C, H, W]``, made-up images in many normalisations."""
    images, generator = made_up_images(kinds, size, shape, seed, varied=True), plain_generator(seed + 1)
    drawn, kind = torch.rand(kinds, 2, generator=generator), torch.arange(kinds)
    least = torch.where(kind % 4 == 3, 0.25, 0.18)  # of strokes
    std, mean = least * (0.6 / least) ** drawn[:, 0], 0.05 + 0.5 * drawn[:, 1]
    plain = (kind % 5 == 0) | (kind % 12 == 7)  # not normalised, the latter strokes
    std[plain], mean[plain] = 1.0, 0.0
    return (images - mean.view(-1, 1, 1, 1, 1)) / std.view(-1, 1, 1, 1, 1)


def _alike_by_class(images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """The images, of which in every eighth kind those of a class have something in common."""
    generator, found = plain_generator(seed + 2), images.clone()
    for kind in range(len(images)):
        if kind % 8 == 1:
            common = 0.8 * float(torch.rand(1, generator=generator))
            for label in labels[kind].unique():
                own = labels[kind] == label
                found[kind, own] = common * images[kind, own][:1] + (1 - common) * images[kind, own]
    return found


def _level_and_contrast(images: Tensor) -> Tensor:
    """``[kinds, 2]`` float64: the mean of each kind, and the logarithm of its standard deviation."""
    away = images - images.mean(dim=(1, 3, 4), keepdim=True)
    return torch.stack([images.flatten(1).mean(dim=1), away.flatten(1).std(dim=1).log()], dim=1).double()


@torch.no_grad()
def _mean_guess(plain: nn.Module, o: Observation, images: Tensor) -> Tensor:
    """``[classes]``, the mean probabilities that the model gives made-up images."""
    model = copy.deepcopy(plain).train(o.training.training_mode)
    buffers = {name: value.clone() for name, value in o.start_buffers.items()}  # which BatchNorm changes in place
    logits = functional_call(model, {**o.parameters, **buffers}, (images,))
    return logits.softmax(dim=1).mean(dim=0).double()


def _kernel(one: Tensor, other: Tensor) -> Tensor:
    count = one.shape[1]
    near = torch.cdist(one, other).square() / count
    return 2 * torch.exp(-near / 4) + 0.3 * (one @ other.T) / count + 0.5


def _likelihood(read: Tensor, error: Tensor, way: Normalization) -> float:
    """Log-likelihood of a level and log contrast, each with its error, if images are normalised so."""
    mean, std = _mean(way[0]), _mean(way[1])
    level, contrast = float(read[0]) * std + mean, float(read[1]) + math.log(std)
    by_level, by_contrast = (float(error[0]) * std) ** 2, float(error[1]) ** 2
    total = 1e-30
    for share, (level_of, level_off), (contrast_of, contrast_off) in IMAGES:
        a, b = level_off**2 + by_level, contrast_off**2 + by_contrast
        off = (level - level_of) ** 2 / a + (contrast - math.log(contrast_of)) ** 2 / b
        total += share * math.exp(-off / 2) / math.sqrt(a * b)
    return math.log(total * std)


def _spectrum(weight: Tensor) -> list[float]:
    """Of a layer's gradient: how much of it is of rank one, and of how many its energy is."""
    rows = weight.double().flatten(1)
    rows = rows if len(rows) <= rows.shape[1] else rows.T
    rows = rows[:256]
    energy = torch.linalg.eigvalsh(rows @ rows.T).clamp(min=1e-30)
    whole = energy.sum()
    return [math.log(float(energy[-1] / whole)), math.log(float(whole**2 / energy.square().sum()))]


def _samples(o: Observation) -> int:
    return (o.training.batch_size or 1) * (o.training.local_steps or 1)


def _wanted(gradient: Mapping[str, Tensor], layer: LastLayer, guess: Tensor, samples: int) -> Tensor:
    """``[classes]``, how many samples a class has, about: the bias's gradient is the mean guess less its share."""
    assert layer.bias is not None
    return samples * (guess - gradient[layer.bias].double())


def _drawn(shares: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """``[size]`` labels in these shares, as nearly as whole numbers are."""
    exact = size * shares / shares.sum()
    counts = exact.floor()
    left = int(size - counts.sum())
    if left:
        counts[torch.multinomial((exact - counts).clamp(min=1e-9), left, generator=generator)] += 1
    return torch.arange(len(shares)).repeat_interleave(counts.long())


def _scatter(
    gradient: Mapping[str, Tensor], layer: LastLayer, mean: Tensor, guess: Tensor, samples: int
) -> list[float]:
    """How far classes' mean features are apart beside the mean of all, how much of that is along one line, and skew.

    A class's rows are B p̄ h̄ less the sum of its samples' features, as long as the model guesses all alike.
    """
    assert layer.bias is not None
    counts = _wanted(gradient, layer, guess, samples).clamp(min=0).round()
    there = counts > 0
    if not there.any():
        return [0.0, 0.0, 0.0]
    skew = math.log(float(counts.square().sum() / counts.sum().square()))
    counts = counts[there][:, None]
    features = samples * (guess[there][:, None] * mean - gradient[layer.weight].double()[there]) / counts
    away = (features - mean) * counts.sqrt()
    along = torch.linalg.svdvals(away)
    size = float(away.square().sum() / len(away) / (mean.square().sum() + 1e-30))
    return [0.5 * math.log(size + 1e-12), math.log(float(along[0] / (along.norm() + 1e-30)) + 1e-12), skew]


def _pairs(parameters: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Names of the layers' weights and biases, of those that have both."""
    names = ((n, n.removesuffix("weight") + "bias") for n, v in parameters.items() if v.dim() > 1)
    return [(weight, bias) for weight, bias in names if weight.endswith("weight") and bias in parameters]


def _levels(weight: Tensor, bias: Tensor) -> list[float]:
    """What a convolution's gradients tell of its inputs' level: weight ``[O, I, h, w]`` and bias ``[O]``."""
    level = weight.mean(dim=(2, 3))
    slopes = [math.asinh(3 * float(v @ bias / (bias @ bias + 1e-30))) / 3 for v in level.T]
    mean = level.mean(dim=1)
    along = float(mean @ bias / (mean.norm() * bias.norm() + 1e-30))
    return [*slopes, along, float(level.norm() * weight[0, 0].numel() ** 0.5 / (weight.norm() + 1e-30))]


def _log_norm(tensor: Tensor) -> float:
    return math.log(float(tensor.double().norm()) + 1e-30)


def _features(change: Mapping[str, Tensor], layer: LastLayer) -> Tensor:
    """``[d]``, the mean features that the last layer's change tells, up to a factor where it has no bias."""
    weight = change[layer.weight].double()
    if layer.bias is None:
        found = torch.linalg.svd(weight, full_matrices=False).Vh[0]
        return found * found.sum().sign()
    bias = change[layer.bias].double()
    return weight.T @ bias / (bias @ bias + 1e-30)
