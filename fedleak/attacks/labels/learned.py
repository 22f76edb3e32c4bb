"""The founding study's third idea: a small network that reads labels off gradients, trained on simulated batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge, Run
from fedleak.attacks.labels.counting import CountInference, Counts, Evidence, bias_gradient, round_counts, scale_known
from fedleak.attacks.labels.posterior import Pool, Samples, domain_images, readings, simulate, skewed_labels
from fedleak.attacks.labels.probe import auxiliary_images, probe
from fedleak.attacks.labels.reader import train_and_read


class Learned(CountInference):
    """A small network trained on batches that the attacker makes itself in the observed models. Needs `batch_size`.

    Batches are of auxiliary images where they are granted, else of dummy images with random labels. One network is
    trained for each batch size in the call, on up to `models` of the observed models.

    Args:
        models: observed models to make batches in.
        batches: batches in each.
        steps: training steps.
    """

    def __init__(self, models: int = 8, batches: int = 256, steps: int = 300) -> None:
        self.models = models
        self.batches = batches
        self.steps = steps

    def count(self, evidence: Evidence, knowledge: Knowledge, run: Run) -> Counts:
        """Label counts of N updates at once."""
        scale_known(evidence, "learned")
        layer = evidence.layer
        if knowledge.auxiliary is not None:
            images, labels = auxiliary_images(knowledge, max(2, 200 // layer.classes), run.seed, "learned")
            pool = Pool(len(images), labels)
        else:
            images, pool = domain_images(knowledge, 16, 12, run.seed), Pool(16 * 12, None, 16)
        bias = bias_gradient(evidence, knowledge, run.seed)
        expected = torch.zeros_like(bias)
        for total in evidence.totals.unique().tolist():
            places = (evidence.totals == total).nonzero()[:, 0].tolist()
            chosen = [evidence.observations[place] for place in places[: self.models]]
            found = probe(chosen, layer, knowledge, images)
            known, shares = [], []
            for unit in found.which.unique().tolist():
                held = chosen[found.which.tolist().index(unit)].parameters
                head, shift = held[layer.weight].double(), _shift(held, layer.bias, layer.classes)
                family = Samples(found.features[unit].double(), found.probabilities[unit].double(), pool)
                drawn = skewed_labels(layer.classes, self.batches, total, run.seed + unit)
                values, truth, _ = simulate([family], [drawn], head, shift, run.seed + unit)
                known.append(_per_class(values, layer.classes))
                shares.append(truth)
            seen = []
            for place in places:
                held = evidence.observations[place].parameters
                head, shift = held[layer.weight].double(), _shift(held, layer.bias, layer.classes)
                one = slice(place, place + 1)
                values = readings(bias[one], evidence.sums[one], evidence.weight[one].double() @ head.T, shift, total)
                seen.append(_per_class(values, layer.classes))
            rows = torch.cat(known)
            expected[places] = total * train_and_read(
                rows, torch.cat(shares), torch.ones(len(rows)), torch.cat(seen), steps=self.steps, seed=run.seed
            )
        return Counts(round_counts(expected, evidence.totals), expected)


def _shift(parameters: Mapping[str, Tensor], name: str | None, classes: int) -> Tensor:
    return parameters[name].double() if name else torch.zeros(classes, dtype=torch.float64)


def _per_class(values: Tensor, classes: int) -> Tensor:
    """``[J, C, 4]``: the readings that there is one of for each class and that have no scale of their own."""
    blocks = values[:, : 5 * classes].view(len(values), 5, classes)
    return blocks[:, [0, 2, 3, 4]].transpose(1, 2)
