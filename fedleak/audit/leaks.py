"""Which tensors of an update leak: what each carries above its noise, and what it alone would tell of the images.

A tensor of n numbers of power P above noise of variance σ² carries at most n/2 log₂(1 + P/σ²) bits (Shannon), of
whatever. What it tells of the images is the limit of `fedleak.limit`, without the truth: at the attacker's own images
where there are some, else at made-up ones, for as many leading coordinates of an image as can be afforded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedleak.attacks.base import Knowledge
from fedleak.attacks.inversion.map.attack import image_prior
from fedleak.attacks.jacobian.models import update_model
from fedleak.attacks.labels.last_layer import LastLayer, find_last_layer
from fedleak.attacks.noise import Noise, noise_of
from fedleak.attacks.problem import Target
from fedleak.audit.made_up import made_up_images
from fedleak.audit.preflight import Preflight
from fedleak.capture import Observation

UNKNOWNS = 384
"""Coordinates of all images together that the limit takes into account: their matrix is solved once a tensor."""
WORK = 3e10
"""Products that one update's limit may cost: some seconds of a core."""
RANK = 1_000_000
"""Numbers of a matrix up to which its rank is looked at."""


@dataclass(frozen=True)
class TensorLeak:
    """What one tensor of an update gives away.

    Attributes:
        name: of the tensor.
        elements: how many numbers it holds.
        share: of the update's squared change.
        bits_at_most: that it carries above its noise.
        tells: of what, in words.
        image_bits: that it alone tells of the images, as far as they were taken into account; None if not computed.
        expected_mse: the mean squared error of an image, rebuilt from this tensor alone at its best.
    """

    name: str
    elements: int
    share: float
    bits_at_most: float
    tells: str
    image_bits: float | None = None
    expected_mse: float | None = None


@dataclass(frozen=True)
class Leaks:
    """What an update gives away, tensor by tensor and all in all.

    Attributes:
        tensors: in the model's order.
        image_bits: that the update tells of its images, `coordinates` of each taken into account; None if not computed.
        expected_mse: the mean squared error of each image at the limit.
        prior_mse: that of a guess without the update.
        coordinates: of how many.
        where: at which images, or why there is no limit.
    """

    tensors: tuple[TensorLeak, ...]
    image_bits: float | None = None
    expected_mse: tuple[float, ...] = ()
    prior_mse: float | None = None
    coordinates: int = 0
    where: str = ""


def leaks(
    preflight: Preflight,
    knowledge: Knowledge,
    counts: Sequence[int],
    error: float,
    images: Tensor | None,
    *,
    seed: int,
    limited: bool = True,
) -> Leaks | None:
    """What each tensor of an update tells; None where there is no update to attack.

    Args:
        preflight: of the update.
        knowledge: the model, its images and classes.
        counts, error: class counts as the attacker reads them, and how far they may be off.
        images: ``[B, C, H, W]`` in [0, 1], the attacker's own, in the order of their labels; None if it has none.
        seed: decides the made-up images.
        limited: whether the limit is wanted.
    """
    observation = preflight.observation
    if observation is None:
        return None
    layer = find_last_layer(knowledge)
    target = _target(observation, preflight.noise)
    noise = noise_of(target, max(1, sum(counts)))
    total = sum(float(v.double().square().sum()) for v in target.update.values())
    rows = [_row(name, target, noise, total, layer, counts, error) for name in target.update]
    if not limited:
        return Leaks(tuple(rows), where="not computed for this update")
    return _with_limit(rows, observation, target, noise, knowledge, counts, images, seed)


def _target(o: Observation, noise: float | None) -> Target:
    """The update as a mean gradient, and the noise that was seen in it."""
    gradient = o.training.mean_gradient(o.parameters, o.update)
    spread = None if noise is None else dict.fromkeys(gradient, noise / (o.training.scale or 1.0))
    return Target(o.parameters, o.start_buffers, gradient, o.training, noise=spread)


def _row(
    name: str, target: Target, noise: Noise, total: float, layer: LastLayer, counts: Sequence[int], error: float
) -> TensorLeak:
    value = target.update[name].double()
    std = noise.std[name].double()
    power = value.square().flatten() if std.dim() else value.square().mean()
    each = torch.log2(1 + power / std.square()) / 2
    bits = float(each.sum() if std.dim() else each * value.numel())
    share = float(value.square().sum()) / total if total else 0.0
    words = _tells(name, value, float(std.min()), layer, counts, error)
    return TensorLeak(name, value.numel(), share, bits, words)


def _tells(name: str, value: Tensor, std: float, layer: LastLayer, counts: Sequence[int], error: float) -> str:
    """What such a tensor tells of, in words."""
    samples = sum(counts)
    if not bool(value.any()):
        return "nothing: it did not change"
    if name in (layer.weight, layer.bias):
        how = "exactly" if error == 0 else f"to about {error:.2g}"
        return f"the labels: how many samples are of each class, {how}"
    if value.dim() == 2:
        if value.numel() > RANK:
            return "what its samples look like to this layer, mixed"
        high = float(torch.linalg.matrix_norm(torch.ones_like(value) * std)) / min(value.shape) ** 0.5
        rank = int((torch.linalg.svdvals(value) > 4 * high).sum())
        if rank == 1 and samples == 1:
            return "what its one sample looks like to this layer, exactly"
        if not rank:
            return "nothing above its noise"
        apart = "as many as samples, or more: each could be told apart" if rank >= samples else "fewer than samples"
        return f"what its samples look like to this layer: {rank} independent mixtures of {samples}, {apart}"
    if value.dim() == 4:
        return "patches of the images, summed over all places and samples"
    return "sums over all places and samples"


def _with_limit(
    rows: list[TensorLeak],
    observation: Observation,
    target: Target,
    noise: Noise,
    knowledge: Knowledge,
    counts: Sequence[int],
    images: Tensor | None,
    seed: int,
) -> Leaks:
    samples = sum(counts)
    numbers = sum(row.elements for row in rows)
    width = min(UNKNOWNS // max(samples, 1), torch.Size(knowledge.image_shape).numel())
    cost = (samples * width) ** 2 * numbers
    if not observation.training.single or observation.training.scale is None:
        return Leaks(tuple(rows), where="not computed: only for one step of a known size")
    if not samples or samples > knowledge.classes or width < 32 or cost > WORK:
        return Leaks(tuple(rows), where="not computed: too many samples or numbers")
    where = "at the attacker's own images" if images is not None else "at made-up images"
    if images is None:
        images = made_up_images(1, samples, knowledge.image_shape, seed)[0]
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    prior = image_prior(knowledge)
    model = update_model(knowledge.model, [target], knowledge.image_shape, dtype=torch.float64)
    model.at(images[None].double(), one_hot(labels, knowledge.classes).double()[None])
    jacobian = model.jacobian(prior.basis(0, width))
    precision = {name: value[None] for name, value in noise.precision().items()}
    rest = prior.variance[width:].sum()

    def reached(names: Sequence[str]) -> tuple[float, list[float]]:
        """Bits and errors from these tensors alone."""
        own = {n: v if n in names else torch.zeros_like(v) for n, v in precision.items()}
        root = torch.linalg.cholesky(jacobian.gram(own)[0] + torch.eye(samples * width, dtype=torch.float64))
        spread = torch.cholesky_inverse(root).diagonal().view(samples, width)
        errors = ((spread * prior.variance[:width]).sum(dim=1) + rest) / len(prior.root)
        return float(root.diagonal().log2().sum()), errors.tolist()

    made = []
    for row in rows:
        bits, errors = reached([row.name])
        made.append(replace(row, image_bits=bits, expected_mse=sum(errors) / len(errors)))
    bits, errors = reached(list(target.update))
    guess = float(prior.variance.sum()) / len(prior.root)
    return Leaks(tuple(made), bits, tuple(errors), guess, width, where)


def as_json(found: Leaks | None) -> dict[str, Any]:
    """For `audit.json`: ``tensors``, a row each, and ``limit``."""
    if found is None:
        return {"tensors": [], "limit": None}
    limit = {name: value for name, value in asdict(found).items() if name != "tensors"}
    return {"tensors": [asdict(row) for row in found.tensors], "limit": limit}
