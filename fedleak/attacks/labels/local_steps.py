"""Label counts behind several local steps, by simulating the client on batches with known labels.

Over several steps the identity λ = B Σ_t (p̄_t − ∂L/∂b_t) needs p̄ along the client's path, which swings with the order
of its labels: one step can move a logit by lr (|h|² + 1). The attacker knows both ends of the path, and simulates what
lies between: thousands of clients cheaply, whose last layer is trained while the features move in a straight line from
those of the first model to those of the last, and a few clients in full, which show how far off the cheap ones are. A
regression then reads the counts off all moments of the last layer's change, and trusts none that the cheap simulation
gets wrong. Around its answer more clients are simulated, and a network learns from the whole ones alone, see
`rehearsal`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, one_hot

from fedleak.attacks.base import Knowledge
from fedleak.attacks.chain import read_layers
from fedleak.attacks.labels.counting import round_counts
from fedleak.attacks.labels.last_layer import LastLayer
from fedleak.attacks.labels.posterior import Pool, near, regress, skewed_labels
from fedleak.attacks.labels.probe import probe
from fedleak.attacks.labels.rehearsal import Trial, class_directions, per_class, read, trial
from fedleak.capture import Observation
from fedleak.local_update import local_update
from fedleak.seeding import global_draws, plain_generator
from fedleak.training import SGD, LocalTraining, Tensors, unroll

_CHUNK = 2**23
"""Numbers that a chunk of cheap simulations may hold."""
_TOGETHER = 32
"""Whole clients that are simulated at once, at most: more are no faster on a CPU."""
_TRUST = 0.9
"""In the network that has seen whole clients only; the rest is the regression's."""


def as_plain(observation: Observation) -> Observation:
    """The observation as if plain SGD had made it: as far as the client's own optimiser takes a gradient of ones.

    So `LocalTraining.mean_gradient` gives about the mean gradient of momentum and weight decay too; exactly where the
    gradients of all steps are equal. An observation of plain SGD, or of an unknown optimiser, is returned as it is.
    """
    training = observation.training
    if training.optimizer is None or training.optimizer.plain or training.steps is None:
        return observation
    one = {"": torch.ones((), dtype=torch.float64)}
    reached = unroll(lambda step, weights: one, {"": torch.zeros_like(one[""])}, replace(training, payload="weights"))
    return replace(observation, training=replace(training, optimizer=SGD(-float(reached[""]) / training.steps)))


@dataclass(frozen=True)
class Path:
    """One client's path in a small basis of the feature space: q columns, the first one constant if there is a bias.

    Attributes:
        start, end: ``[M, q]``, features of the inputs in the model sent out and in the model that came back.
        head: ``[C, q]``, the last layer sent out.
        centre: ``[q]``, the mean feature.
        white: ``[q, K]``, from centred features to their principal components, each of variance 1.
        basis: ``[d, q']``, orthonormal; q' = q without the constant.
        biased: whether the layer has a bias.
    """

    start: Tensor
    end: Tensor
    head: Tensor
    centre: Tensor
    white: Tensor
    basis: Tensor
    biased: bool

    def moments(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Gradients of the last layer in the basis, ``[..., C, q]``, of ``[..., C, d]`` and ``[..., C]``."""
        seen = weight.double() @ self.basis
        return torch.cat([bias.double()[..., None], seen], dim=-1) if bias is not None else seen

    def readings(self, moments: Tensor, reach: float) -> Tensor:
        """``[J, F]``: the bias gradient first, then every class's moments about it, then where its logits went.

        Args:
            moments: ``[J, C, q]``, mean gradients of the last layer.
            reach: learning rate × local steps, of plain SGD that goes as far.
        """
        bias = self.bias(moments)
        about = (moments - bias[..., None] * self.centre) @ self.white
        logits = self.logits(moments, reach)
        return torch.cat([bias, about.flatten(1), logits.softmax(dim=2).flatten(1)], dim=1)

    def logits(self, moments: Tensor, reach: float) -> Tensor:
        """``[J, 5, C]``, those of the mean feature from first to last; see `readings`."""
        times = torch.linspace(0, 1, 5, dtype=torch.float64)[None, :, None]
        return self.head @ self.centre - reach * times * (moments @ self.centre)[:, None]

    def middle(self, time: float) -> Tensor:
        """``[M, q]``, features on the way."""
        return self.start + time * (self.end - self.start)

    def bias(self, moments: Tensor) -> Tensor:
        """``[J, C]``, ∂L/∂b; without a bias, what it would be if every feature vector were the mean one."""
        return moments[..., 0] if self.biased else moments @ self.centre / self.centre.square().sum()


def local_step_counts(
    observation: Observation,
    weight: Tensor,
    bias: Tensor | None,
    layer: LastLayer,
    knowledge: Knowledge,
    images: Tensor,
    pool: Pool,
    rough: Tensor,
    *,
    seed: int,
    clients: int = 2000,
    in_full: int = 256,
) -> tuple[Tensor, Tensor]:
    """Real-valued counts ``[C]`` of an update of several local steps, and their root mean square error.

    Args:
        observation: the update; how its client trained is known.
        weight, bias: ``[C, d]`` and ``[C]``, the last layer's mean gradient over the steps, see `as_plain`.
        layer: the last layer.
        knowledge: what the attacker holds.
        images: ``[M, C, H, W]`` to simulate clients with, see `fedleak.attacks.labels.posterior.inputs`.
        pool: their labels.
        rough: ``[K, C]``, other methods' shares: the second regression starts from those counts, or from the first's
            answer, whose simulated clients come closest to the update.
        seed: decides every draw.
        clients: cheap simulations of each of the two regressions.
        in_full: whole simulations of the last, fewer for large models and many epochs.
    """
    total, classes = observation.training.samples, layer.classes
    reach = _reach(observation)
    assert total is not None
    path = _path(observation, layer, knowledge, images, max(2, min(30, 600 // classes - 1)))
    size = sum(value.numel() for value in observation.parameters.values())
    fewer = min(1.0, 1e5 / size, 4e3 / total) / (observation.training.epochs or 1)
    in_full = max(4, int(in_full * fewer))
    seen = path.readings(path.moments(weight, bias)[None], reach)
    generator = plain_generator(seed)
    tried = trial(knowledge.model, images, pool, classes)
    watched: list[tuple[Tensor, Tensor, Tensor]] = []
    share = error = torch.ones(())
    base = torch.zeros(classes, dtype=torch.int64)
    for last in (False, True):
        values, shares, half = [], [], []
        for place, (index, part) in enumerate(pool.halves()):
            if last:
                drawn = near(base, total * error, clients // 2, seed + place, skewed=True)
            else:
                drawn = skewed_labels(classes, clients // 2, total, seed + place)
            drawn = drawn.gather(1, torch.rand(drawn.shape, generator=generator).argsort(dim=1))
            pick = index[part.draw(drawn, generator)]
            moments = _cheap(path, pick, drawn, observation)
            few = slice(0, (in_full if last else max(4, in_full // 4)) // 2)
            whole, ends = _full(observation, layer, knowledge, path, images, pick[few], drawn[few], seed, tried)
            watched.append((whole, ends, drawn[few]))
            off = whole - moments[few]
            noise = torch.randn(len(drawn), len(off), generator=generator, dtype=torch.float64) / len(off) ** 0.5
            moments = moments + off.mean(dim=0) + torch.einsum("jn,ncq->jcq", noise, off - off.mean(dim=0))
            values.append(path.readings(moments, reach))
            shares.append(one_hot(drawn, classes).double().mean(dim=1))
            half.append(torch.full((len(drawn),), place))
        found = regress(torch.cat(values), torch.cat(shares), torch.cat(half), seen)
        share, error = found.shares, found.error
        if not last:
            guesses = round_counts(total * torch.cat([share[None], rough]), torch.full((1 + len(rough),), total))
            base = guesses[_likeliest(observation, layer, knowledge, path, images, pool, guesses, seen, seed)]
    rehearsed = _rehearsed(observation, path, pool, path.moments(weight, bias), watched, tried, seed)
    return total * (_TRUST * rehearsed + (1 - _TRUST) * share), total * error


def _rehearsed(
    observation: Observation,
    path: Path,
    pool: Pool,
    seen: Tensor,
    watched: list[tuple[Tensor, Tensor, Tensor]],
    tried: Trial,
    seed: int,
) -> Tensor:
    """Class shares ``[C]`` by a network that has seen whole clients only.

    Args:
        observation: the update.
        path: the basis of the moments.
        pool: labels of the images in `path`.
        seen: ``[C, q]``, the update's moments.
        watched: moments ``[J, C, q]``, outcomes ``[J, C, F]`` and labels ``[J, B]`` of simulated clients.
        tried: what made the outcomes.
        seed: decides what the network learns.
    """
    reach, classes = _reach(observation), len(seen)
    white, along = class_directions((path.middle(0.5) - path.centre) @ path.white, pool.labels, classes)

    def readings(moments: Tensor, outcomes: Tensor) -> Tensor:
        bias = path.bias(moments)
        about = (moments - bias[..., None] * path.centre) @ path.white @ white
        return per_class(bias, about, along, path.logits(moments, reach), outcomes)

    moments, outcomes, labels = (torch.cat(each) for each in zip(*watched, strict=True))
    known = readings(moments, outcomes)
    asked = readings(seen[None], tried.outcome(observation, _came_back(observation, observation.update))[None])[0]
    return read(known, one_hot(labels, classes).double().mean(dim=1), asked, seed=seed)


def _path(observation: Observation, layer: LastLayer, knowledge: Knowledge, images: Tensor, components: int) -> Path:
    """The features of `images` at both ends of a client's path, in the directions that matter."""
    start, training = observation.parameters, observation.training
    steps, end = training.steps, _came_back(observation, observation.update)
    assert steps is not None
    once = replace(training, local_steps=1, epochs=1)
    ends = [replace(observation, parameters=parameters, training=once) for parameters in (start, end)]
    found = probe(ends, layer, knowledge, images)
    first, last = (found.features[unit].double() for unit in found.which.tolist())
    both = torch.cat([first, last])
    mean = both.mean(dim=0)
    head = start[layer.weight].double()
    directions = torch.linalg.svd(both - mean, full_matrices=False)[2][: 2 * components]
    basis = torch.linalg.qr(torch.cat([mean[:, None], head.T, directions.T], dim=1))[0]
    first, last, head = first @ basis, last @ basis, head @ basis
    if layer.bias:
        ones = torch.ones_like(first[:, :1])
        first, last = torch.cat([ones, first], dim=1), torch.cat([ones, last], dim=1)
        head = torch.cat([start[layer.bias].double()[:, None], head], dim=1)
    middle = first + (last - first) * (steps - 1) / (2 * steps)
    centre = middle.mean(dim=0)
    _, sizes, axes = torch.linalg.svd(middle - centre, full_matrices=False)
    white = axes[:components].T * (len(images) ** 0.5 / sizes[:components].clamp(min=1e-9 * float(sizes[0])))
    return Path(first, last, head, centre, white, basis, layer.bias is not None)


def _likeliest(
    observation: Observation,
    layer: LastLayer,
    knowledge: Knowledge,
    path: Path,
    images: Tensor,
    pool: Pool,
    guesses: Tensor,
    seen: Tensor,
    seed: int,
    clients: int = 12,
) -> int:
    """Which of the counts ``[K, C]`` gives the readings `seen` ``[1, F]``, by `clients` whole simulations of each."""
    generator = plain_generator(seed)
    reach = _reach(observation)
    means, within = [], []
    for counts in guesses:
        drawn = torch.arange(len(counts)).repeat_interleave(counts).expand(clients, -1)
        drawn = drawn.gather(1, torch.rand(drawn.shape, generator=generator).argsort(dim=1))
        pick = pool.draw(drawn, generator)
        values = path.readings(_full(observation, layer, knowledge, path, images, pick, drawn, seed)[0], reach)
        means.append(values.mean(dim=0))
        within.append(values.var(dim=0))
    width = torch.stack(within).mean(dim=0)
    misfit = (torch.stack(means) - seen).square() / (width + 1e-6 * width.mean()).clamp(min=1e-30)
    return int(misfit.mean(dim=1).argmin())


def _cheap(path: Path, pick: Tensor, labels: Tensor, observation: Observation) -> Tensor:
    """Mean gradients ``[J, C, q]`` of the last layer over the local steps of J clients, the body not being trained.

    Args:
        path: where the features come from.
        pick, labels: ``[J, T · B]``, inputs and labels, local step by local step.
        observation: how the clients train.
    """
    training = _followed(observation.training)
    assert training.steps is not None
    assert training.local_steps is not None
    classes, width = path.head.shape
    first, move = path.start.float(), (path.end - path.start).float() / training.steps
    batch = pick.shape[1] // training.local_steps
    size = max(1, _CHUNK // (classes * width + batch * (classes + width)))
    found = []
    for inputs, names in zip(pick.split(size), labels.split(size), strict=True):

        def gradient_at(step: int, weights: Tensors, inputs: Tensor = inputs, names: Tensor = names) -> Tensors:
            begin = step % (pick.shape[1] // batch) * batch
            now = slice(begin, begin + batch)
            features = (first + step * move)[inputs[:, now]]
            error = (features @ weights["head"].transpose(1, 2)).softmax(dim=2) - one_hot(names[:, now], classes)
            return {"head": error.transpose(1, 2) @ features / batch}

        head = path.head.float().expand(len(inputs), -1, -1)
        found.append(_mean(observation, {"head": head}, unroll(gradient_at, {"head": head}, training))["head"])
    return torch.cat(found)


def _reach(observation: Observation) -> float:
    """Learning rate × local steps of plain SGD that goes as far as the client did."""
    training = as_plain(observation).training
    assert training.lr is not None
    assert training.steps is not None
    return training.lr * training.steps


def _followed(training: LocalTraining) -> LocalTraining:
    """How to simulate the client: gradients add up without the rounding of weights, if that is all."""
    plain = training.optimizer is not None and training.optimizer.plain
    return replace(training, payload="gradient" if plain else "weights")


def _mean(observation: Observation, start: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> Tensors:
    """The mean gradient of what a client simulated by `_followed` sent, as `as_plain` makes it of the observation."""
    training = replace(as_plain(observation).training, payload=_followed(observation.training).payload)
    return training.mean_gradient(
        {name: value.double() for name, value in start.items()}, {name: sent[name].double() for name in start}
    )


def _full(
    observation: Observation,
    layer: LastLayer,
    knowledge: Knowledge,
    path: Path,
    images: Tensor,
    pick: Tensor,
    labels: Tensor,
    seed: int,
    tried: Trial | None = None,
) -> tuple[Tensor, Tensor]:
    """What `_cheap` returns, by training the whole model as the client did, and what came of it, see `Trial`."""
    training = _followed(observation.training)
    head = {name: observation.parameters[name] for name in (layer.weight, layer.bias) if name}
    dtype = observation.parameters[layer.weight].dtype
    found, outcomes = [], []
    with global_draws(seed):  # dropout draws from torch's global state
        for update in _updates(observation, knowledge, images.to(dtype), pick, labels, training):
            mean = _mean(observation, head, update)
            found.append(path.moments(mean[layer.weight], mean[layer.bias] if layer.bias else None))
            if tried is not None:
                outcomes.append(tried.outcome(observation, _came_back(replace(observation, training=training), update)))
    return torch.stack(found), torch.stack(outcomes) if outcomes else torch.empty(0)


def _updates(
    observation: Observation,
    knowledge: Knowledge,
    images: Tensor,
    pick: Tensor,
    labels: Tensor,
    training: LocalTraining,
) -> Iterator[Tensors]:
    """What each client sends: several at a time where nothing is drawn and no statistics move."""
    model, start, buffers = knowledge.model, observation.parameters, observation.start_buffers
    moded = copy.deepcopy(model).cpu().train(training.training_mode)
    if buffers or read_layers(moded, knowledge.image_shape) is None:
        for inputs, names in zip(pick, labels, strict=True):
            yield local_update(model, start, buffers, images[inputs], names, training).update
        return
    few = max(1, min(_TOGETHER, _CHUNK // sum(value.numel() for value in start.values())))
    batch = pick.shape[1] // (training.local_steps or 1)

    def loss(weights: Tensors, inputs: Tensor, names: Tensor) -> Tensor:
        return cross_entropy(functional_call(moded, weights, (inputs,)), names)

    gradients = vmap(grad(loss))
    for places, names in zip(pick.split(few), labels.split(few), strict=True):

        def gradient_at(step: int, weights: Tensors, places: Tensor = places, names: Tensor = names) -> Tensors:
            first = step % (training.local_steps or 1) * batch
            now = slice(first, first + batch)
            found: Tensors = gradients(weights, images[places[:, now]], names[:, now])
            return found

        with torch.no_grad():
            each = {name: value.expand(len(places), *value.shape) for name, value in start.items()}
            sent = unroll(gradient_at, each, training)
        for place in range(len(places)):
            yield {name: value[place] for name, value in sent.items()}


def _came_back(observation: Observation, sent: Mapping[str, Tensor]) -> Tensors:
    """The weights after the local steps, or where the sum of their gradients leads."""
    if observation.training.payload == "weights":
        return dict(sent)
    lr = as_plain(observation).training.lr
    assert lr is not None
    return {name: value - lr * sent[name] for name, value in observation.parameters.items()}
