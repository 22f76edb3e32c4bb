"""Images from the exact features of every sample, where the last layer's row space holds them: a start for all others.

In trained models the samples of a batch leave traces of very different sizes: a solver of all gradients at once finds
the unsure sample and leaves the others behind. The row space gives each sample's features whatever its size; each image
is first sought from its own, with noise of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedleak.attacks.base import Knowledge, Run
from fedleak.attacks.chain.base import Dense
from fedleak.attacks.image_prior import ImagePrior
from fedleak.attacks.inversion.map.solver import GaussNewton, Settings, State
from fedleak.attacks.jacobian.features import FeatureModel
from fedleak.attacks.labels.counting import collect
from fedleak.attacks.labels.fedleak import EXACT, search_row_space
from fedleak.attacks.labels.last_layer import LastLayer, find_last_layer
from fedleak.attacks.noise import rounding
from fedleak.attacks.problem import Problem, Target
from fedleak.capture import Observation
from fedleak.errors import UsageError

_SMALLEST = 1e-8
"""Least standard deviation of a feature."""
_LARGEST = 12
"""Samples up to which the row space is searched."""
_SETTINGS = Settings(coarse_steps=2, max_steps=3, linear=1e-4, ahead=1e-5)
"""Features are nearly linear in an image, and solved for by elimination: the noise's level can fall fast."""


class _FeatureSolver(GaussNewton):
    """`GaussNewton` by elimination in the features, of which there are few: exact however small their noise is."""

    _at: Tensor | None = None

    def _solve(self, state: State, right: Tensor) -> Tensor:
        """With J = R^-½ J_z: dz = −Jᵀ M⁻¹ r − (z − Jᵀ M⁻¹ J z) / (1 + λ), M = J Jᵀ + s (1 + λ)."""
        if self._at is not state.z:
            self.rough.at(self.images(state.z), self.labels)
            (block,) = self.rough.jacobian(self.prior.basis(0, self._width)).blocks.values()
            assert isinstance(block, Dense)
            self._columns = block.values[:, 0].to(right) * self.root["features"][:, None]  # [P, K, d]
            self._at = state.z
        columns, z = self._columns, state.z[:, 0, :, None]
        matrix = columns.mT @ columns
        matrix.diagonal(dim1=1, dim2=2).add_((state.s * (1 + state.damping))[:, None])
        wanted = torch.cat([state.residual["features"][..., None], columns.mT @ z], 2)
        factor, _ = torch.linalg.cholesky_ex(matrix)
        solved = columns @ torch.cholesky_solve(wanted, factor)
        move = -solved[..., :1] - (z - solved[..., 1:]) / (1 + state.damping[:, None, None])
        return move.mT.nan_to_num(0, 0, 0)


def images_from_features(
    problem: Problem, observation: Observation, knowledge: Knowledge, prior: ImagePrior, run: Run
) -> Tensor | None:
    """Images ``[B, C, H, W]`` in the order of a problem's first labels; None where the features cannot be told.

    They can for batches of fewer samples than classes (or what the label inference found), whose single gradient
    is neither noisy nor changed by a defense, in networks that do not mix the samples of a batch.
    """
    target = problem.targets[0]
    mixing = target.training.training_mode and len(target.buffers) > 0
    if problem.labels is None or problem.samples < 2 or not target.training.single or mixing:
        return None
    if target.imitate is not None or target.noise is not None or observation.training.per_sample:
        return None
    try:
        layer = find_last_layer(knowledge)
    except UsageError:
        return None
    features = problem.features
    if features is None:
        features = _searched(problem, observation, knowledge, layer, run)
    if features is None:
        return None
    labels = problem.labels[0].to(run.device)
    return _images(features.double().to(run.device), labels, target, knowledge, layer, prior, run)


def _searched(
    problem: Problem, observation: Observation, knowledge: Knowledge, layer: LastLayer, run: Run
) -> Tensor | None:
    """The features ``[B, d]`` that go with the labels, where the row space has them."""
    assert problem.labels is not None
    if problem.samples > min(layer.classes - 1, layer.features, _LARGEST) or layer.bias is None:
        return None
    found = search_row_space(collect([observation], layer), knowledge, run)[0]
    same = (found.labels.cpu() == problem.labels[0].cpu()).all(1).nonzero()[:, 0].tolist()
    if not same or float(found.residual[same[0]]) > EXACT:
        return None
    return found.features[same[0], :, : layer.features]


def _images(
    features: Tensor,
    labels: Tensor,
    target: Target,
    knowledge: Knowledge,
    layer: LastLayer,
    prior: ImagePrior,
    run: Run,
) -> Tensor:
    held = {n: v.double().to(run.device) for n, v in target.parameters.items()}
    logits = features @ held[layer.weight].T + (held[layer.bias] if layer.bias else 0.0)
    hot = one_hot(labels, layer.classes).double()
    # G = Eᵀ H / B with the errors E of the logits: what its noise does to H = B E⁺ᵀ G.
    amplified = torch.linalg.pinv((logits.softmax(1) - hot).T / len(labels)).norm(dim=1)
    noise = rounding(target, layer.weight).to(features)
    std = (noise * amplified).clamp(min=_SMALLEST)[:, None].expand_as(features)
    sigmoid = bool(((features > 0) & (features < 1)).all())
    observed = features
    if sigmoid:
        observed, std = torch.logit(features), std / (features * (1 - features))
    exact, rough = (
        FeatureModel(knowledge.model, target, layer.name, logits=sigmoid, device=run.device, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    none = torch.zeros(len(labels), 1, layer.classes, dtype=torch.float64, device=features.device)
    precision = {"features": std**-2.0}
    solver = _FeatureSolver(exact, rough, {"features": observed}, precision, none, prior, _SETTINGS)
    width = min([*_SETTINGS.stages, len(prior.root)])
    start = torch.zeros(len(labels), 1, width, dtype=torch.float64, device=features.device)
    with torch.no_grad():
        state = solver.run(solver.start(start))
    return solver.images(state.z)[:, 0]
