"""A small network that reads class shares off what the closed forms make of a gradient, every class alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedleak.attacks.base import Knowledge
from fedleak.attacks.labels.counting import Evidence
from fedleak.attacks.labels.llg import greedy_counts
from fedleak.attacks.labels.posterior import models, regress, simulate, skewed_labels
from fedleak.seeding import global_draws, plain_generator


class Reader(nn.Module):
    """Class shares from per-class readings: the same function for every class, which sees the others' mean and maximum.

    Args:
        inputs: readings a class, F.
        width: hidden units.
    """

    def __init__(self, inputs: int, width: int = 48) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))
        self.share = nn.Sequential(
            nn.Linear(3 * width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1)
        )

    def forward(self, values: Tensor) -> Tensor:
        """``[J, C, F]`` readings to ``[J, C]`` shares that sum to 1."""
        hidden = self.each(values)
        most, mean = hidden.amax(dim=1, keepdim=True), hidden.mean(dim=1, keepdim=True)
        together = torch.cat([hidden, most.expand_as(hidden), mean.expand_as(hidden)], dim=2)
        result: Tensor = self.share(together)[..., 0].softmax(dim=1)
        return result


def train_and_read(
    known: Tensor, shares: Tensor, weight: Tensor, seen: Tensor, *, steps: int, seed: int, batch: int = 128
) -> Tensor:
    """Train a `Reader` on batches with known labels, and read others.

    Args:
        known: ``[J, C, F]`` readings.
        shares: ``[J, C]``, class shares behind them.
        weight: ``[J]``, how often to train on each, relative.
        seen: ``[N, C, F]`` readings of the batches to read.
        steps: training steps.
        seed: decides initialisation and draws.
        batch: batches in a step.

    Returns:
        ``[N, C]`` float64 shares.
    """
    centre = known.mean(dim=(0, 1))
    spread = known.std(dim=(0, 1)).clamp(min=1e-30)
    known, seen = (((values - centre) / spread).clamp(-5, 5).float() for values in (known, seen))
    with global_draws(seed):
        reader = Reader(known.shape[2])
    optimizer = torch.optim.Adam(reader.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator = plain_generator(seed)
    for _ in range(steps):
        some = torch.multinomial(weight, min(batch, len(known)), replacement=True, generator=generator)
        optimizer.zero_grad()
        # Absolute differences are what label accuracy counts.
        (reader(known[some]) - shares[some].float()).abs().sum(dim=1).mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        result: Tensor = reader(seen).double()
        return result


def read_shares(
    evidence: Evidence, knowledge: Knowledge, *, seed: int, batches: int = 2048, steps: int = 400, trust: float = 0.7
) -> Tensor:
    """``[N, C]`` float64, class shares of N updates where no regression is sure, some seconds each.

    In trained models a few doubtful samples make up the gradient, and nothing is linear. Two readers are trained for an
    update on batches simulated in its model, each on one half of the samples, and their mean with the regression's
    answer is taken.

    Args:
        evidence: N updates, of at most 20 classes.
        knowledge: what the attacker holds.
        seed: decides every draw, the same for each update.
        batches: simulated batches.
        steps: training steps of a reader.
        trust: weight of the readers against the regression.
    """
    classes = evidence.layer.classes
    found = torch.zeros(evidence.sums.shape, dtype=torch.float64)
    for n, model in enumerate(models(evidence, knowledge, seed, per_class=80)):
        total, halves = int(evidence.totals[n]), model.halves()
        drawn = [skewed_labels(classes, batches // len(halves), total, seed + part) for part in range(len(halves))]
        values, shares, half = simulate(halves, drawn, model.head, model.shift, seed)
        line = regress(values, shares, half, model.seen)
        mean = torch.cat([family.probabilities for family in model.families]).mean(dim=0)
        known, asked = (
            torch.cat([per_class(rows, classes, mean, total), answers.clamp(-0.2, 1.2)[..., None]], dim=2)
            for rows, answers in ((values, line.held_out), (model.seen, line.shares[None]))
        )
        weight = line.weight + 0.2 / len(values)
        read = [
            train_and_read(known[part], shares[part], weight[part], asked, steps=steps, seed=seed)[0]
            for part in (half == 0, half == 1)
        ]
        found[n] = trust * torch.stack(read).mean(dim=0) + (1 - trust) * line.shares
    return found


def per_class(values: Tensor, classes: int, mean: Tensor, total: int) -> Tensor:
    """``[J, C, 11]``: what `fedleak.attacks.labels.posterior.readings` say of each class, and two methods' counts.

    Args:
        values: ``[J, F]`` readings with logits.
        classes: C.
        mean: ``[C]``, an estimate of p̄.
        total: labels in each batch.
    """
    bias, sums, solved, relative, direction = values[:, : 5 * classes].view(-1, 5, classes).unbind(dim=1)
    logits = values[:, 5 * classes :].view(-1, classes, classes).diagonal(dim1=1, dim2=2)
    totals = torch.full((len(values),), total)
    llg = greedy_counts(sums, sums.clamp(max=0).sum(dim=1) / total * (1 + 1 / classes), None, totals)
    own = greedy_counts(bias, torch.full_like(bias[:, 0], (1 / classes - 1) / total), None, totals)
    size = bias.norm(dim=1, keepdim=True).clamp(min=1e-30).log().expand_as(bias)
    parts = [bias, _signed_log(bias), relative, direction, solved, llg.counts / total, own.counts / total]
    return torch.stack([*parts, mean - bias, _signed_log(logits), size, mean.expand_as(bias)], dim=2)


def _signed_log(values: Tensor) -> Tensor:
    """Logarithm of the size with the sign: a trained model's gradients are of all sizes."""
    return values.sign() * ((values.abs() + 1e-7).log() + 16.2)
