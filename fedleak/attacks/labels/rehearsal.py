"""Label counts behind several local steps, read by a network that has watched whole clients train.

What a class's count does to the last layer over several steps is not linear: a step that overshoots makes one class win
the next, and how often each won can be told from the size of its row's moments and from what the model that came back
makes of known images. `Reader` is the same function for every class, so that a few hundred simulated clients teach it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedleak.attacks.labels.posterior import Pool
from fedleak.attacks.labels.reader import train_and_read
from fedleak.capture import Observation
from fedleak.training import Tensors

_EACH = 5
"""Images of a class that a model is tried on."""


@dataclass(frozen=True)
class Trial:
    """Known images on which the models that come back are tried.

    Attributes:
        model: the architecture.
        images: ``[M, C, H, W]``.
        labels: ``[M]``; None where they are noise.
        classes: C.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor | None
    classes: int

    def outcome(self, observation: Observation, end: Tensors) -> Tensor:
        """``[C, 3]`` or ``[C, 5]`` of the weights a client came back with: what is said of each class, on the whole,
        at most and in logits, and of images of the class itself."""
        model, mode = self.model, self.model.training
        state = {**observation.parameters, **end, **observation.start_buffers}
        try:
            with torch.no_grad():
                logits = functional_call(model.eval(), state, (self.images,)).double()
        finally:
            model.train(mode)
        logits = torch.nan_to_num(logits - logits.mean(dim=1, keepdim=True))
        said = logits.softmax(dim=1)
        found = [said.mean(dim=0), said.amax(dim=0), logits.mean(dim=0)]
        if self.labels is not None:
            own = torch.nn.functional.one_hot(self.labels, self.classes).double()
            own = own / own.sum(dim=0).clamp(min=1)
            found += [(said * own).sum(dim=0), (logits * own).sum(dim=0)]
        return torch.stack(found, dim=1)


def trial(model: nn.Module, images: Tensor, pool: Pool, classes: int) -> Trial:
    """Some images of each class, or some of noise, to try models on."""
    if pool.labels is None:
        step = max(1, len(images) // (_EACH * 10))
        return Trial(model, images[::step], None, classes)
    few = torch.cat([(pool.labels == label).nonzero()[:_EACH, 0] for label in range(classes)])
    return Trial(model, images[few], pool.labels[few], classes)


def class_directions(features: Tensor, labels: Tensor | None, classes: int) -> tuple[Tensor, Tensor]:
    """Coordinates ``[q, K]`` in which samples of a class scatter evenly, and the unit direction of each class in them,
    ``[C, K]``; of features ``[M, q]`` about their mean. Without labels the classes have no directions: zeros."""
    if labels is None:
        scatter, means = features, features.new_zeros(classes, features.shape[1])
    else:
        counts = torch.bincount(labels, minlength=classes).clamp(min=1)[:, None]
        means = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features) / counts
        scatter = features - means[labels]
        means = means - means.mean(dim=0)
    covariance = scatter.T @ scatter / len(scatter)
    covariance.diagonal().add_(1e-3 * float(covariance.diagonal().mean()) + 1e-30)
    sizes, axes = torch.linalg.eigh(covariance)
    white = axes / sizes.clamp(min=1e-30).sqrt()
    return white, torch.nn.functional.normalize(means @ white)


def per_class(bias: Tensor, about: Tensor, along: Tensor, logits: Tensor, outcomes: Tensor) -> Tensor:
    """``[J, C, F]``: what there is to read of each class.

    Args:
        bias: ``[J, C]``, ∂L/∂b.
        about: ``[J, C, K]``, every class's moments about it, in the coordinates of `class_directions`.
        along: ``[C, K]``, the direction of each class.
        logits: ``[J, T, C]``, where those of a mean input went.
        outcomes: ``[J, C, F']``, see `Trial.outcome`.
    """
    moments = about @ along.T  # [J, row, class]
    own = moments.diagonal(dim1=1, dim2=2)
    others = moments - torch.diag_embed(own)
    extremes = [others.amin(2), others.amax(2), others.amin(1), others.amax(1)]
    size = (bias.abs() + 1e-4).log() + 9.3
    parts = [bias, bias.sign() * size, own, others.sum(dim=1), about.norm(dim=2), *extremes]
    parts += [*logits.softmax(dim=2).unbind(dim=1), logits[:, 0], logits[:, -1]]
    return torch.cat([torch.stack(parts, dim=2), outcomes], dim=2)


def read(known: Tensor, shares: Tensor, seen: Tensor, *, seed: int, steps: int = 300) -> Tensor:
    """Class shares ``[C]`` behind the readings `seen` ``[C, F]``, by a reader trained in so many steps on clients with
    readings `known` ``[J, C, F]`` and class shares ``[J, C]``."""
    even = torch.ones(len(known))
    return train_and_read(known, shares, even, seen[None], steps=steps, seed=seed, batch=64)[0]
