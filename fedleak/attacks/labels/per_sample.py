"""iDLG's per-sample scenario: the gradient of each sample is shared, and each has its own label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from fedleak.attacks.base import Knowledge, LabelGuess, LabelInference, Run
from fedleak.attacks.labels.idlg import sign_rule
from fedleak.attacks.labels.last_layer import find_last_layer, last_layer_gradients, per_sample_gradients, where
from fedleak.capture import Observation
from fedleak.errors import UsageError


class PerSample(LabelInference):
    """iDLG's sign rule on the gradient of every sample (Zhao et al. 2020). Needs `per_sample_gradients`."""

    needs: ClassVar[frozenset[str]] = frozenset({"per_sample_gradients"})

    def check_model(self, knowledge: Knowledge) -> None:
        """See `LabelInference.check_model`: a last linear layer is needed."""
        find_last_layer(knowledge)

    def infer(
        self, observations: Sequence[Observation], knowledge: Knowledge, run: Run, *, candidates: int = 1
    ) -> list[LabelGuess | None]:
        """The labels of each observation's samples; None for an observation that carries an error.

        Raises:
            UsageError: if an update has no sample dimension.
        """
        guesses: list[LabelGuess | None] = [None] * len(observations)
        usable = [index for index, observation in enumerate(observations) if observation.error is None]
        if not usable:
            return guesses
        layer = find_last_layer(knowledge)
        for index in usable:
            observation = observations[index]
            if not observation.training.per_sample:
                raise UsageError(
                    f"attack/labels=per_sample needs the gradient of each sample, and {where(observation)} is one for "
                    "the whole batch; grant threat.per_sample_gradients=true, or choose attack/labels=fedleak"
                )
            last_layer_gradients([observation], layer)  # refuses NaN
            labels = sign_rule(per_sample_gradients(observation, layer).weight)
            guesses[index] = LabelGuess(labels.sort().values[None], torch.ones(1))
        return guesses
