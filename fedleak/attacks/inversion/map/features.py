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
from fedleak.attacks.image_prior import ImagePrior
from fedleak.attacks.inversion.map.solver import GaussNewton, Settings
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
_SETTINGS = Settings(coarse_steps=4, max_steps=8)


def images_from_features(
    problem: Problem, observation: Observation, knowledge: Knowledge, prior: ImagePrior, run: Run
) -> Tensor | None:
    """Images ``[B, C, H, W]`` in the order of a problem's first labels; None where the features cannot be told.

    They can for batches of up to half as many samples as classes (or what the label inference found), whose single
    gradient is neither noisy nor changed by a defense, in networks that do not mix the samples of a batch.
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
    if 2 * problem.samples > min(layer.classes, layer.features) or layer.bias is None:
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
    error = (logits.softmax(1) - one_hot(labels, layer.classes)).norm(dim=1)
    noise = rounding(target, layer.weight).to(features)
    std = (noise * len(labels) / error.clamp(min=1e-12)).clamp(min=_SMALLEST)[:, None].expand_as(features)
    sigmoid = bool(((features > 0) & (features < 1)).all())
    observed = features
    if sigmoid:
        observed, std = torch.logit(features), std / (features * (1 - features))
    exact, rough = (
        FeatureModel(knowledge.model, target, layer.name, logits=sigmoid, device=run.device, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    none = torch.zeros(len(labels), 1, layer.classes, dtype=torch.float64, device=features.device)
    solver = GaussNewton(exact, rough, {"features": observed}, {"features": std**-2.0}, none, prior, _SETTINGS)
    width = min([*_SETTINGS.stages, len(prior.root)])
    start = torch.zeros(len(labels), 1, width, dtype=torch.float64, device=features.device)
    with torch.no_grad():
        state = solver.run(solver.start(start))
    return solver.images(state.z)[:, 0]
