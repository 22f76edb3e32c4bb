"""The founding study's second idea for a better version 1: a label's impact from dummy batches."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge, Run
from fedleak.attacks.labels.counting import CountInference, Counts, Evidence, fill, scale_known
from fedleak.attacks.labels.probe import Probe, dummy_images, probe
from fedleak.attacks.labels.version1 import most_negative
from fedleak.seeding import plain_generator


def dummy_impact(found: Probe, batches: Tensor, labels: Tensor) -> Tensor:
    """``[U]``: how far a class's g_c moves for each label of it in a batch of one, fitted over dummy batches.

    Args:
        found: M dummy inputs in U networks.
        batches: ``[J, b]`` int64, which inputs are in each dummy batch.
        labels: ``[J, b]`` int64, their labels.
    """
    classes = found.probabilities.shape[2]
    truth = torch.nn.functional.one_hot(labels, classes).double()  # [J, b, C]
    error = found.probabilities.double()[:, batches] - truth  # [U, J, b, C]
    gradients = (error * found.sums[:, batches][..., None]).mean(dim=2)
    shares = truth.mean(dim=1) - truth.mean(dim=(0, 1))
    gradients = gradients - gradients.mean(dim=1, keepdim=True)
    return (gradients * shares).sum(dim=(1, 2)) / shares.square().sum()


class DummyBatches(CountInference):
    """Version 1 with the impact fitted on dummy batches in the attacked model. Needs `batch_size`.

    Args:
        inputs: dummy inputs, uniform noise images.
        batches: dummy batches of `inputs` of them, with repetition, labelled at random.
    """

    def __init__(self, inputs: int = 16, batches: int = 16) -> None:
        self.inputs = inputs
        self.batches = batches

    def count(self, evidence: Evidence, knowledge: Knowledge, run: Run) -> Counts:
        """Label counts of N updates at once."""
        scale_known(evidence, "dummy_batches")
        found = probe(evidence.observations, evidence.layer, knowledge, dummy_images(knowledge, self.inputs, run.seed))
        generator = plain_generator(run.seed)
        shape = (self.batches, self.inputs)
        batches = torch.randint(self.inputs, shape, generator=generator)
        labels = torch.randint(knowledge.classes, shape, generator=generator)
        impact = dummy_impact(found, batches, labels)[found.which].clamp(max=-1e-300) / evidence.totals
        sums, totals = evidence.sums, evidence.totals
        present = (sums < 0).long()
        present = present.where((present.sum(dim=1) <= totals)[:, None], most_negative(sums, totals))
        return Counts(fill(present, sums, -impact, totals), sums / impact[:, None])
