"""iDLG's per-sample scenario: the gradient of each sample is shared, and each has its own label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from fedleak.attacks.base import Knowledge, LabelGuess, Run
from fedleak.attacks.labels.idlg import sign_rule
from fedleak.attacks.labels.last_layer import (
    LastLayer,
    LastLayerInference,
    last_layer_gradients,
    per_sample_gradients,
    where,
)
from fedleak.capture import Observation
from fedleak.errors import UsageError


class PerSample(LastLayerInference):
    """iDLG's sign rule on the gradient of every sample (Zhao et al. 2020). Needs `per_sample_gradients`."""

    needs: ClassVar[frozenset[str]] = frozenset({"per_sample_gradients"})

    def read(
        self, observations: Sequence[Observation], layer: LastLayer, knowledge: Knowledge, run: Run, candidates: int
    ) -> list[LabelGuess]:
        """The labels of each update's samples; see `LastLayerInference.read`."""
        guesses = []
        for observation in observations:
            if not observation.training.per_sample:
                raise UsageError(
                    f"attack/labels=per_sample needs the gradient of each sample, and {where(observation)} is one for "
                    "the whole batch; grant threat.per_sample_gradients=true, or choose attack/labels=fedleak"
                )
            last_layer_gradients([observation], layer)  # refuses NaN
            labels = sign_rule(per_sample_gradients(observation, layer).weight)
            guesses.append(LabelGuess(labels.sort().values[None], torch.ones(1)))
        return guesses
