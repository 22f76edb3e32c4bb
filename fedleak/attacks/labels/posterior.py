"""Label counts by simulation: what gradients of batches with known labels look like in the attacked model.

Every closed form (the identity, LLG, iLRG) reads the counts with some estimate of what it does not see. Here the
attacker simulates batches in each observed model, takes the closed forms' readings of them, and learns by ridge
regression how to weigh these readings and what error remains. Only the last layer is simulated: one forward pass of a
few hundred images for each model, and no backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge
from fedleak.attacks.labels.counting import Counts, Evidence, bias_gradient, round_counts
from fedleak.attacks.labels.ilrg import solve_counts
from fedleak.attacks.labels.probe import auxiliary_images, probe
from fedleak.seeding import numpy_generator, plain_generator


@dataclass(frozen=True)
class Posterior:
    """Counts of N updates and how sure they are.

    Attributes:
        counts: integer counts, and the real-valued ones they were rounded from.
        spread: ``[N]`` float64, root mean square error of the real-valued counts in simulated batches.
    """

    counts: Counts
    spread: Tensor


@dataclass(frozen=True)
class Pool:
    """Inputs to make batches from.

    Attributes:
        size: how many, M.
        labels: ``[M]``; None where the inputs are noise and any label is as good.
        domains: number of equal consecutive parts; a batch of noise is drawn from one of them.
    """

    size: int
    labels: Tensor | None
    domains: int = 1

    def halves(self) -> list[tuple[Tensor, Pool]]:
        """Two disjoint parts with the same classes and as many domains: their inputs ``[M']``, and them as pools."""
        place = torch.empty(self.size, dtype=torch.int64)
        if self.labels is None:
            place[:] = torch.arange(self.domains).repeat_interleave(self.size // self.domains)
        else:
            place[self.labels.argsort(stable=True)] = torch.arange(self.size)
        parts = []
        for index in ((place % 2 == 0).nonzero()[:, 0], (place % 2 == 1).nonzero()[:, 0]):
            labels = None if self.labels is None else self.labels[index]
            parts.append((index, Pool(len(index), labels, max(1, self.domains // 2))))
        return parts

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """An input for each of `labels` ``[J, B]``: a random one of the class, or any where there is none of it."""
        if self.labels is None:
            size = self.size // self.domains
            domain = torch.randint(self.domains, (len(labels), 1), generator=generator)
            return domain * size + torch.randint(size, labels.shape, generator=generator)
        sizes = torch.bincount(self.labels, minlength=int(labels.max()) + 1)
        first = sizes.cumsum(dim=0) - sizes
        order = self.labels.argsort()
        place = (torch.rand(labels.shape, generator=generator) * sizes[labels]).long() + first[labels]
        return order[place.clamp(max=self.size - 1)]


@dataclass(frozen=True)
class Samples:
    """What one model makes of a pool's inputs: features ``[M, d]`` and probabilities ``[M, C]``."""

    features: Tensor
    probabilities: Tensor
    pool: Pool

    def halves(self) -> list[Samples]:
        """The samples of the pool's two halves."""
        return [Samples(self.features[index], self.probabilities[index], pool) for index, pool in self.pool.halves()]


def label_posterior(
    evidence: Evidence,
    knowledge: Knowledge,
    *,
    seed: int,
    batches: int = 768,
) -> Posterior:
    """Counts of N updates by regression on simulated batches of their models.

    With auxiliary data batches are drawn from them. Without, half of the batches are dummy images with random labels,
    which describe an untrained model, and half imagined features (`imagined_features`), which describe a trained one;
    those with a gradient of the observed size weigh most. A second regression on batches with counts near the first's
    answer refines it.

    Args:
        evidence: N updates.
        knowledge: what the attacker holds.
        seed: decides every draw, the same for each update.
        batches: simulated batches of each regression.
    """
    classes = evidence.layer.classes
    expected = torch.zeros(evidence.sums.shape, dtype=torch.float64)
    spread = torch.zeros(len(expected), dtype=torch.float64)
    for n, model in enumerate(models(evidence, knowledge, seed)):
        total = int(evidence.totals[n])
        halves = model.halves()
        each = batches // len(halves)
        drawn = [skewed_labels(classes, each, total, seed + part) for part in range(len(halves))]
        first = regress(*simulate(halves, drawn, model.head, model.shift, seed), model.seen)
        base = round_counts(total * first.shares[None], evidence.totals[n : n + 1])[0]
        drawn = [near(base, total * first.error, each, seed + part) for part in range(len(halves))]
        second = regress(*simulate(halves, drawn, model.head, model.shift, seed + len(halves)), model.seen)
        expected[n], spread[n] = total * second.shares, total * second.error
    return Posterior(Counts(round_counts(expected, evidence.totals), expected), spread)


@dataclass(frozen=True)
class Model:
    """What the attacker knows of one update and of the model behind it.

    Attributes:
        families: samples to simulate batches from; what they are is uncertain, so that there may be several kinds.
        head, shift: ``[C, d]`` and ``[C]``, the last layer; zeros where it has no bias.
        seen: ``[1, F]``, the update's readings.
    """

    families: list[Samples]
    head: Tensor
    shift: Tensor
    seen: Tensor

    @property
    def trained(self) -> bool:
        """Whether the model looks trained, so that dummy images alone do not describe what it makes of real ones."""
        first = self.families[0]
        if first.pool.labels is None:
            return len(self.families) > 1
        return bool((first.probabilities.argmax(1) == first.pool.labels).double().mean() > 0.5)

    def halves(self) -> list[Samples]:
        """First and second halves of the families in turn."""
        return [half for family in self.families for half in family.halves()]


def models(evidence: Evidence, knowledge: Knowledge, seed: int, per_class: int = 40) -> Iterator[Model]:
    """The models of N updates, in order, with up to `per_class` auxiliary images of each class run through them."""
    layer = evidence.layer
    images, pool = inputs(knowledge, seed, per_class=per_class)
    found = probe(evidence.observations, layer, knowledge, images)
    bias = bias_gradient(evidence, knowledge, seed)
    for n, observation in enumerate(evidence.observations):
        unit, one = int(found.which[n]), slice(n, n + 1)
        head = observation.parameters[layer.weight].double()
        shift = observation.parameters[layer.bias].double() if layer.bias else torch.zeros_like(head[:, 0])
        features, probabilities = found.features[unit].double(), found.probabilities[unit].double()
        families = [Samples(features, probabilities, pool)]
        if pool.labels is None:
            imagined = imagined_features(features, head, shift, min(20 * layer.classes, 400), seed)
            mean = features.mean(dim=0)
            # A fresh head would need features further from those seen than these are from zero: it is not trained.
            if float((imagined.features - mean).norm(dim=1).median()) < float(mean.norm()):
                families.append(imagined)
        logits = (evidence.weight[n].double() @ head.T)[None]
        seen = readings(bias[one], evidence.sums[one], logits, shift, int(evidence.totals[n]))
        yield Model(families, head, shift, seen)


def inputs(
    knowledge: Knowledge, seed: int, *, per_class: int = 40, domains: int = 32, domain_size: int = 12
) -> tuple[Tensor, Pool]:
    """Images ``[M, C, H, W]`` to make batches from: auxiliary ones, or dummy images where there are too few."""
    if knowledge.auxiliary is not None and len(knowledge.auxiliary[1]) >= 2 * knowledge.classes:
        most = max(2, min(per_class, 800 // knowledge.classes))
        images, labels = auxiliary_images(knowledge, most, seed, "fedleak")
        return images, Pool(len(images), labels)
    return domain_images(knowledge, domains, domain_size, seed), Pool(domains * domain_size, None, domains)


def domain_images(knowledge: Knowledge, domains: int, size: int, seed: int) -> Tensor:
    """``[domains · size, C, H, W]`` in [0, 1]: noise of many kinds, dark to bright, flat to harsh, fine to coarse.

    What a client's images are like is not known, and a batch's mean probability moves with it: a regression over many
    kinds of images learns to read the kind off the gradient too.
    """
    generator = plain_generator(seed)
    channels, height, width = knowledge.image_shape
    images = []
    for domain in range(domains):
        level, force = torch.rand(2, generator=generator).tolist()
        grain = 1 + domain % 6
        noise = torch.randn(size, channels, -(-height // grain), -(-width // grain), generator=generator)
        noise = torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear")
        images.append((2 * level - 0.75 + 1.5 * force * noise).clamp(0, 1))
    return torch.cat(images)


def simulate(
    families: list[Samples], drawn: list[Tensor], head: Tensor, shift: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Readings ``[J, F]``, class shares ``[J, C]`` and half ``[J]`` of batches with labels `drawn`, ``[J', B]`` each.

    Families come as first and second halves in turn.
    """
    values, shares, half = [], [], []
    for part, (family, labels) in enumerate(zip(families, drawn, strict=True)):
        total = labels.shape[1]
        error = errors_of(family, labels, seed + part)
        ones = torch.ones(len(family.features), dtype=torch.float64)
        sums = torch.stack([ones, family.features.sum(dim=1)], dim=1)
        moments = error @ torch.cat([sums, family.features @ head.T], dim=1) / total
        values.append(readings(moments[..., 0], moments[..., 1], moments[..., 2:], shift, total))
        shares.append(torch.nn.functional.one_hot(labels, len(shift)).double().mean(dim=1))
        half.append(torch.full((len(labels),), part % 2))
    return torch.cat(values), torch.cat(shares), torch.cat(half)


def imagined_features(features: Tensor, head: Tensor, shift: Tensor, count: int, seed: int) -> Samples:
    """Features with such logits as a trained model gives, nearest to the mean of `features`: log-odds of the label
    uniformly from -2 to 11, other logits normal. Shapes as in `Samples`; head ``[C, d]``, shift ``[C]``."""
    generator = plain_generator(seed)
    classes = len(shift)
    labels = torch.randint(classes, (count,), generator=generator)
    width = 1 + 2 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    logits = torch.randn(count, classes, generator=generator, dtype=torch.float64) * width
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(dim=1)
    odds = 13 * torch.rand(count, generator=generator, dtype=torch.float64) - 2
    logits = logits.scatter(1, labels[:, None], (others + odds)[:, None])
    centre = features.mean(dim=0)
    away = logits - (head @ centre + shift)
    away = away - away.mean(dim=1, keepdim=True)
    moved = centre + away @ torch.linalg.pinv(head - head.mean(dim=0)).T
    return Samples(moved, (moved @ head.T + shift).softmax(dim=1), Pool(count, labels))


def skewed_labels(classes: int, count: int, size: int, seed: int) -> Tensor:
    """``[J, B]`` labels of batches of every skew: class shares Dirichlet(α), α from 0.1 to 100."""
    generator = numpy_generator(seed)
    skew = 10 ** generator.uniform(-1, 2, size=(count, 1))
    weights = generator.standard_gamma(np.broadcast_to(skew, (count, classes))) + 1e-12
    steps = (weights / weights.sum(axis=1, keepdims=True)).cumsum(axis=1)
    uniform = torch.from_numpy(generator.random((count, size)))
    return torch.searchsorted(torch.from_numpy(steps), uniform).clamp(max=classes - 1)


def near(counts: Tensor, spread: Tensor, batches: int, seed: int, *, skewed: bool = False) -> Tensor:
    """``[J, B]`` labels of batches that have `counts` ``[C]`` but for some random changes, about `spread` a class.

    A label changes to any class alike or, if `skewed`, to one as common as it is in `counts`.
    """
    generator = plain_generator(seed)
    classes, total = len(counts), int(counts.sum())
    labels = torch.arange(classes).repeat_interleave(counts).expand(batches, -1)
    share = (4 * classes * float(spread) ** 2 + 2) / total
    change = torch.rand(batches, total, generator=generator) < share * torch.rand(batches, 1, generator=generator)
    if skewed:
        new = torch.multinomial((counts + 0.5) / total, batches * total, replacement=True, generator=generator)
        return torch.where(change, new.view(batches, total), labels)
    return torch.where(change, torch.randint(classes, (batches, total), generator=generator), labels)


def errors_of(family: Samples, drawn: Tensor, seed: int) -> Tensor:
    """``[J, C, M]``: how often input m is in batch j, times its p, minus how often with label c."""
    inputs, classes = family.probabilities.shape
    pick = family.pool.draw(drawn, plain_generator(seed))
    counts = torch.zeros(len(drawn), classes * inputs, dtype=torch.float64)
    counts.scatter_add_(1, drawn * inputs + pick, torch.ones(drawn.shape, dtype=torch.float64))
    counts = counts.view(len(drawn), classes, inputs)
    return counts.sum(dim=1, keepdim=True) * family.probabilities.T - counts


def readings(bias: Tensor, sums: Tensor, logits: Tensor, shift: Tensor, total: int) -> Tensor:
    """``[J, F]``, what the closed forms take from J gradients.

    Args:
        bias: ``[J, C]``, ∂L/∂b.
        sums: ``[J, C]``, g_c.
        logits: ``[J, C, C]``, ∂L/∂W Wᵀ.
        shift: ``[C]``, b.
        total: labels in each batch.
    """
    safe = torch.where(bias.abs() < 1e-30, torch.full_like(bias, 1e-30), bias)
    confidences = torch.nan_to_num(logits / safe[..., None] + shift, posinf=1e30, neginf=-1e30).softmax(dim=2)
    solved = solve_counts(confidences, bias, torch.full((len(bias),), total)) / total
    impact = sums.clamp(max=0).sum(dim=1, keepdim=True).clamp(max=-1e-30)
    parts = [bias, sums, solved.clamp(-0.5, 1.5), (sums / impact).clamp(-3, 3), torch.nn.functional.normalize(bias)]
    if len(shift) <= 20:
        parts.append(logits.flatten(1))
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Regression:
    """What `regress` makes of one update.

    Attributes:
        shares: ``[C]``, class shares of the batch behind it.
        error: root mean square error of such an answer.
        held_out: ``[J, C]``, answers for the known batches, each from the regression on the other half.
        weight: ``[J]``, how much each known batch weighed.
    """

    shares: Tensor
    error: Tensor
    held_out: Tensor
    weight: Tensor


def regress(values: Tensor, shares: Tensor, half: Tensor, seen: Tensor) -> Regression:
    """Class shares behind the readings `seen` ``[1, F]`` by weighted ridge regression on known batches.

    Either the shares are regressed on the readings, or p̄, from which the identity gives them; whichever errs less.
    Known batches weigh by how near the size of their bias gradient is to that seen. The penalty is the one that
    carries over best from batches of one half of the samples to batches of the other: within a half, a trained
    model's few doubtful samples would be learnt by heart.

    Args:
        values: ``[J, F]``, readings of the known batches, ∂L/∂b first.
        shares: ``[J, C]``, their class shares.
        half: ``[J]``, 0 or 1.
        seen: ``[1, F]``.
    """
    classes = shares.shape[1]
    size = values[:, :classes].norm(dim=1).clamp(min=1e-30).log()
    gap = (size - seen[:, :classes].norm(dim=1).clamp(min=1e-30).log()).abs()
    width = gap.sort().values[len(gap) // 4].clamp(min=0.1)
    weight = (-0.5 * (gap / width).square()).exp()
    weight = weight / weight.sum()
    centre = weight @ values
    spread = (weight @ (values - centre).square()).sqrt().clamp(min=1e-30)
    known, asked = ((values - centre) / spread).clamp(-5, 5), ((seen - centre) / spread).clamp(-5, 5)
    best: Regression | None = None
    for offset, seen_offset in ((values[:, :classes], seen[0, :classes]), (torch.zeros_like(shares), torch.zeros(1))):
        level = weight @ (shares + offset)  # shares + ∂L/∂b is p̄, whose ridge shrinks to the plain identity
        target = shares + offset - level
        errors = torch.zeros(len(_PENALTIES), dtype=torch.float64)
        held_out = torch.zeros(len(_PENALTIES), *shares.shape, dtype=torch.float64)
        for fold in (0, 1):
            train, test = half == fold, half != fold
            for k, coefficients in enumerate(_ridge(known[train], target[train], weight[train])):
                guess = known[test] @ coefficients
                errors[k] += weight[test] @ (target[test] - guess).square().mean(dim=1)
                held_out[k, test] = guess + level - offset[test]
        least = int(errors.argmin())
        if best is None or float(errors[least].sqrt()) < float(best.error):
            answer = level + (asked @ _ridge(known, target, weight)[least])[0] - seen_offset
            best = Regression(answer.clamp(0, 1), errors[least].sqrt(), held_out[least], weight)
    assert best is not None
    return best


_PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1e4)


def _ridge(known: Tensor, target: Tensor, weight: Tensor) -> list[Tensor]:
    """Ridge coefficients ``[F, C]`` for each penalty."""
    weight = weight / weight.sum()
    sizes, vectors = torch.linalg.eigh(known.T @ (known * weight[:, None]))
    pulled = vectors.T @ (known.T @ (target * weight[:, None]))
    return [vectors @ (pulled / (sizes.clamp(min=0) + penalty)[:, None]) for penalty in _PENALTIES]
