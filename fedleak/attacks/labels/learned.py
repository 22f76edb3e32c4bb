"""The founding study's third idea: a small network that reads labels off gradients, trained on simulated batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedleak.attacks.base import Knowledge
from fedleak.attacks.labels.counting import CountInference, Counts, Evidence, bias_gradient, round_counts, scale_known
from fedleak.attacks.labels.posterior import Pool, Samples, domain_images, readings, simulate, skewed_labels
from fedleak.attacks.labels.probe import auxiliary_images, probe


class Reader(nn.Module):
    """Class shares from per-class readings, the same function for every class.

    Args:
        inputs: readings a class, F.
        width: hidden units.
    """

    def __init__(self, inputs: int, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3 * inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1)
        )

    def forward(self, values: Tensor) -> Tensor:
        """``[J, C, F]`` readings to ``[J, C]`` shares that sum to 1."""
        low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
        return self.net(torch.cat([values, low.expand_as(values), high.expand_as(values)], dim=2))[..., 0].softmax(
            dim=1
        )


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

    def count(self, evidence: Evidence, knowledge: Knowledge, *, seed: int) -> Counts:
        """Label counts of N updates at once."""
        scale_known(evidence, "learned")
        layer = evidence.layer
        if knowledge.auxiliary is not None:
            images, labels = auxiliary_images(knowledge, max(2, 200 // layer.classes), seed, "learned")
            pool = Pool(len(images), labels)
        else:
            images, pool = domain_images(knowledge, 16, 12, seed), Pool(16 * 12, None, 16)
        bias = bias_gradient(evidence, knowledge, seed)
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
                drawn = skewed_labels(layer.classes, self.batches, total, seed + unit)
                values, truth, _ = simulate([family], [drawn], head, shift, seed + unit)
                known.append(_per_class(values, layer.classes))
                shares.append(truth)
            seen = []
            for place in places:
                held = evidence.observations[place].parameters
                head, shift = held[layer.weight].double(), _shift(held, layer.bias, layer.classes)
                one = slice(place, place + 1)
                values = readings(bias[one], evidence.sums[one], evidence.weight[one].double() @ head.T, shift, total)
                seen.append(_per_class(values, layer.classes))
            expected[places] = total * self._read(torch.cat(known), torch.cat(shares), torch.cat(seen), seed)
        return Counts(round_counts(expected, evidence.totals), expected)

    def _read(self, known: Tensor, shares: Tensor, seen: Tensor, seed: int) -> Tensor:
        """Train on known readings ``[J, C, F]`` and shares ``[J, C]``, and read ``[N, C, F]``."""
        mean, spread = known.mean(dim=(0, 1)), known.std(dim=(0, 1)).clamp(min=1e-30)
        known, seen = (((values - mean) / spread).clamp(-5, 5).float() for values in (known, seen))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            reader = Reader(known.shape[2])
        optimizer = torch.optim.Adam(reader.parameters(), lr=3e-3)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.steps):
            some = torch.randint(len(known), (min(128, len(known)),), generator=generator)
            optimizer.zero_grad()
            (reader(known[some]) - shares[some].float()).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            return reader(seen).double()


def _shift(parameters: Mapping[str, Tensor], name: str | None, classes: int) -> Tensor:
    return parameters[name].double() if name else torch.zeros(classes, dtype=torch.float64)


def _per_class(values: Tensor, classes: int) -> Tensor:
    """``[J, C, 4]``: the readings that there is one of for each class and that have no scale of their own."""
    blocks = values[:, : 5 * classes].view(len(values), 5, classes)
    return blocks[:, [0, 2, 3, 4]].transpose(1, 2)
