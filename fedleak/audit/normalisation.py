"""Whether clients' images can be normalised as stated: their updates beside those of made-up images, each usual way.

How large a layer's weight gradient is beside its bias's goes with the size of its inputs; the first layer's own tells
the images' level, the last layer's the mean features, BatchNorm's running statistics those of the first layer. Natural
images differ in level and contrast, so that each usual normalisation is tried on made-up images of many kinds, and the
update is compared with what comes of each. Two normalisations with one centre differ as images of more and of less
contrast do, and are hardly told apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedleak.attacks.base import Knowledge
from fedleak.attacks.labels.last_layer import LastLayer, find_last_layer
from fedleak.audit.checks import CONSISTENT, CONTRADICTS, UNKNOWN, Check
from fedleak.audit.preflight import Preflight
from fedleak.audit.shapes import NORMALIZATIONS
from fedleak.capture import Observation
from fedleak.local_update import local_update
from fedleak.models.normalized import normalized
from fedleak.seeding import plain_generator
from fedleak.training import LocalTraining, Tensors

Normalization = tuple[list[float], list[float]]
"""Mean and standard deviation, one number a channel or one for all, on the [0, 1] scale."""
PLAIN: Normalization = ([0.0], [1.0])
"""None."""
_HALF: Normalization = ([0.5], [0.5])
MARGIN, MARGIN_OF_CONTRAST = 4.0, 6.0
"""Log-likelihood by which another normalisation must be better: of another centre, and of another contrast alone."""
UPDATES = 4
"""Updates that are looked at together."""
KINDS = 48
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
    layer = find_last_layer(knowledge)
    ways = usual(knowledge.image_shape[0], stated)
    scores = _Judge(plain, knowledge, layer, seen[0], ways, seed).scores(seen)
    # One more update is half as much worth as one of another federation: they share their images' kind.
    pooled = [sum(column) / len(seen) * len(seen) ** 0.5 for column in zip(*scores, strict=True)]
    behind = tuple(max(pooled) - value for value in pooled)
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
    margin = MARGIN if _centre(best, stated) > 0.6 else MARGIN_OF_CONTRAST
    if behind[0] > margin:
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


class _Judge:
    """What updates look like under each normalisation, in the model of one round."""

    def __init__(
        self,
        plain: nn.Module,
        knowledge: Knowledge,
        layer: LastLayer,
        observation: Observation,
        ways: Sequence[Normalization],
        seed: int,
    ) -> None:
        self._layer, self._seen = layer, observation
        heavy = sum(p.numel() for p in plain.parameters()) > 3_000_000
        size = min(observation.training.batch_size or 1, 8 if heavy else 32)
        kinds = KINDS // 2 if heavy else KINDS
        images = made_up_images(kinds, size, knowledge.image_shape, seed)
        labels = torch.randint(knowledge.classes, (kinds, size), generator=plain_generator(seed))
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
        self._pairs = _pairs(observation.parameters)
        rows = []
        for mean, std in ways:
            model = plain if (mean, std) == PLAIN else normalized(plain, mean, std)
            row = []
            for own, targets in zip(images, labels, strict=True):
                start = dict(observation.start_buffers)
                done = local_update(model, observation.parameters, start, own, targets, training)
                row.append(self._traits({n: -v for n, v in done.update.items()}, done.buffers, 1))
            rows.append(row)
        self._fit(rows)

    def _traits(self, change: Tensors, buffers: Mapping[str, Tensor], steps: int) -> tuple[Tensor, Tensor]:
        """Numbers that do not mind how large the step was, ``[S]``; and vectors, the mean features among them."""
        plain = []
        for weight, bias in self._pairs:
            plain.append(_log_norm(change[weight]) - _log_norm(change[bias]))
        if self._pairs and change[self._pairs[0][0]].dim() == 4:
            plain += _levels(*(change[name].double() for name in self._pairs[0]))
        vector = _features(change, self._layer)
        if self._norm:
            plain += self._statistics(buffers, steps)
        return torch.tensor([*plain, _log_norm(vector)], dtype=torch.float64), vector

    def _statistics(self, buffers: Mapping[str, Tensor], steps: int) -> list[float]:
        """Mean and log variance of the first BatchNorm's inputs, off its running statistics before and after."""
        kept = (1 - self._new) ** steps
        mean, spread = (
            (buffers[f"{self._norm}.{name}"].double() - kept * self._seen.start_buffers[f"{self._norm}.{name}"])
            / (1 - kept)
            for name in ("running_mean", "running_var")
        )
        return [*mean[:8].tolist(), *spread[:8].clamp(min=1e-9).log().tolist()]

    def _fit(self, rows: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> None:
        vectors = torch.stack([vector for row in rows for _, vector in row])
        self._size, self._centre = float(vectors.norm(dim=1).median()), vectors.mean(dim=0)
        self._axes = torch.linalg.svd(vectors - self._centre, full_matrices=False).Vh[:8].T
        clouds = [torch.stack([self._joined(*one) for one in row]) for row in rows]
        away = torch.cat([cloud - cloud.mean(dim=0) for cloud in clouds])
        shared = away.T @ away / len(away)
        self._clouds = []
        for cloud in clouds:
            off = cloud - cloud.mean(dim=0)
            spread = 0.6 * off.T @ off / len(off) + 0.4 * shared
            spread += 1e-3 * spread.diag().diag() + 1e-9 * torch.eye(len(spread))
            self._clouds.append((cloud.mean(dim=0), torch.linalg.cholesky(spread)))

    def _joined(self, plain: Tensor, vector: Tensor) -> Tensor:
        return torch.cat([plain, (vector - self._centre) @ self._axes / self._size])

    def scores(self, observations: Sequence[Observation]) -> list[list[float]]:
        """Log-likelihood of each update under each normalisation, with the heavy tails of Student's t."""
        found = []
        for o in observations:
            change = {n: v - o.parameters[n] for n, v in o.update.items()}
            change = {n: -v for n, v in o.update.items()} if o.training.payload == "gradient" else change
            traits = self._joined(*self._traits(change, o.buffers, o.training.steps or 1))
            row = []
            for mean, root in self._clouds:
                far = float(torch.linalg.solve_triangular(root, (traits - mean)[:, None], upper=False).square().sum())
                row.append(-(8 + len(mean)) / 2 * math.log1p(far / 8) - float(root.diag().log().sum()))
            found.append(row)
        return found


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


def _features(change: Tensors, layer: LastLayer) -> Tensor:
    """``[d]``, the mean features that the last layer's change tells, up to a factor where it has no bias."""
    weight = change[layer.weight].double()
    if layer.bias is None:
        found = torch.linalg.svd(weight, full_matrices=False).Vh[0]
        return found * found.sum().sign()
    bias = change[layer.bias].double()
    return weight.T @ bias / (bias @ bias + 1e-30)


def made_up_images(kinds: int, size: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """``[kinds, size, C, H, W]`` in [0, 1]: clouds with a natural image's spectrum, of many levels and contrasts; every
    fourth kind is of bright strokes on dark."""
    generator = plain_generator(seed)
    channels, height, width = shape

    def normal(*of: int) -> Tensor:
        return torch.randn(*of, generator=generator)

    def uniform() -> float:
        return float(torch.rand(1, generator=generator))

    across, down = torch.fft.rfftfreq(width)[None], torch.fft.fftfreq(height)[:, None]
    frequency = (across**2 + down**2).sqrt().clamp(min=1 / max(height, width))

    def clouds(count: int, steep: float) -> Tensor:
        drawn = torch.fft.irfft2(
            torch.fft.rfft2(normal(size, count, height, width)) / frequency**steep, s=(height, width)
        )
        return _standard(drawn - drawn.mean(dim=(2, 3), keepdim=True))

    made = []
    for kind in range(kinds):
        steep = 0.6 + 1.4 * uniform()
        shade = clouds(1, steep)
        shade = shade if channels == 1 else _standard(shade + 0.35 * clouds(channels, steep))
        level = 0.25 + 0.45 * uniform() + 0.12 * normal(size, 1, 1, 1) + 0.06 * normal(size, channels, 1, 1)
        contrast = (0.13 + 0.2 * uniform()) * (1 + 0.3 * normal(size, 1, 1, 1)).clamp(0.3, 2)
        images = level + contrast * shade
        if kind % 4 == 3:
            edge = torch.quantile(shade.flatten(1), 0.8 + 0.12 * uniform(), dim=1)[:, None, None, None]
            images = torch.sigmoid(8 * (shade - edge))
        made.append(images.clamp(0, 1))
    return torch.stack(made)


def _standard(images: Tensor) -> Tensor:
    return images / images.flatten(1).std(dim=1)[:, None, None, None]
