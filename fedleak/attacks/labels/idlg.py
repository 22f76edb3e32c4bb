"""iDLG's sign rule: the label of a single sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge, LabelGuess, Run
from fedleak.attacks.labels.last_layer import LastLayer, LastLayerInference, last_layer_gradients, where
from fedleak.capture import Observation
from fedleak.errors import UsageError


def sign_rule(weight: Tensor) -> Tensor:
    """The label of each single-sample gradient of the last layer.

    Row c of the gradient is (p_c - [c = y]) h: with features of one sign, as after sigmoid or ReLU, the label is the
    one class whose row sum g_c is negative. With features of either sign several may be; then the label's row is the
    longest, since its |p_y - 1| is the sum of all other p_c.

    Args:
        weight: ``[N, C, d]``, ∂L/∂W.

    Returns:
        ``[N]`` int64.
    """
    sums = weight.sum(dim=2, dtype=torch.float64)
    one_negative = (sums < 0).sum(dim=1) == 1
    return torch.where(one_negative, sums.argmin(dim=1), weight.norm(dim=2).argmax(dim=1))


class IDLG(LastLayerInference):
    """The one class with a negative gradient (iDLG, Zhao et al. 2020). Needs one sample an update, and says so."""

    most_samples = 1

    def read(
        self, observations: Sequence[Observation], layer: LastLayer, knowledge: Knowledge, run: Run, candidates: int
    ) -> list[LabelGuess]:
        """One label for each; see `LastLayerInference.read`."""
        for observation in observations:
            training = observation.training
            samples = (training.batch_size or 1) * (training.local_steps or 1)  # at least so many
            if samples != 1:
                raise UsageError(
                    f"attack/labels=idlg reads the label of a single sample, and {where(observation)} holds {samples}; "
                    "choose attack/labels=fedleak (from Python method='fedleak'), or let clients take one step on one "
                    "sample (federation.batch_size=1, federation.local_steps=1)"
                )
        labels = sign_rule(last_layer_gradients(observations, layer).weight)
        return [LabelGuess(label.view(1, 1), torch.ones(1)) for label in labels]
