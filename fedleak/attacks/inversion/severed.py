"""Single samples behind layers that draw at random: the network is cut below these, where the update tells the rest.

Of a single sample, the gradient of a fully connected layer's bias is the signal δ that goes back through its output,
whatever was drawn above it. So below PRECODE's encoder, or below dropout on the last layer's inputs, all gradients are
those of the loss ⟨δ, output⟩ at the private image, with nothing random in them (Balunović et al. 2022 break PRECODE by
the same layer, from its input). Dropped inputs are the columns of the last layer's gradient that are zero.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedleak.attacks.base import Knowledge, LabelGuess, Run
from fedleak.attacks.problem import Problem
from fedleak.attacks.results import Reconstruction, StopReason
from fedleak.models.bottleneck import VariationalBottleneck
from fedleak.seeding import generator
from fedleak.training import Tensors

_DROPOUT = nn.modules.dropout._DropoutNd
_FOUND = 3e-9
"""Relative square of the gap between the updates from which the image is found."""


@dataclass(frozen=True)
class Cut:
    """Where a model is cut.

    Attributes:
        layer: name of the fully connected layer; of a bottleneck its encoder, else the model's last.
        kept: share of its inputs that dropout keeps, None where they are not dropped.
    """

    layer: str
    kept: float | None


def cut_of(model: nn.Module, training_mode: bool) -> Cut | None:
    """Where to cut a model that draws at random in train mode; None where it does not, or in another place."""
    if not training_mode:
        return None
    drawing = [(name, module) for name, module in model.named_modules() if _draws(module)]
    encoders = [f"{name}.encoder" for name, module in drawing if isinstance(module, VariationalBottleneck)]
    if encoders:
        return Cut(encoders[0], None) if isinstance(drawing[0][1], VariationalBottleneck) else None
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name, _ in model.named_modules()]
    if len(drawing) == 1 and linear and names.index(drawing[0][0]) == names.index(linear[-1]) - 1:
        return Cut(linear[-1], 1 - drawing[0][1].p)
    return None


def _draws(module: nn.Module) -> bool:
    return isinstance(module, VariationalBottleneck) or (isinstance(module, _DROPOUT) and module.p > 0)


def severed(problem: Problem, guess: LabelGuess | None, cut: Cut, knowledge: Knowledge, run: Run) -> Reconstruction:
    """The image of one sample, from the gradients below a cut, by L-BFGS from a few starts.

    Args:
        problem: of one sample and one local step.
        guess: its label.
        cut: where.
        knowledge: the model.
        run: where to compute, and the seed.
    """
    began = time.perf_counter()
    below = _Below(problem, cut, knowledge, run)
    best, images, evaluations, starts = torch.inf, torch.full((1, *knowledge.image_shape), 0.5), 0, 0
    for attempt in range(4):
        starts += 1
        random = generator(run.seed, "severed", *problem.key, attempt)
        begin = 0.5 + 0.1 * attempt * torch.randn(1, *knowledge.image_shape, generator=random, dtype=torch.float64)
        found, gap, count = _descend(below.gap, begin.to(run.device))
        evaluations += count
        if gap < best:
            best, images = gap, found.float().clamp(0, 1).cpu()
        if best < _FOUND:
            break
    return Reconstruction(
        round=problem.key[0],
        client=problem.key[1],
        images=images,
        labels=torch.zeros(1, dtype=torch.int64) if guess is None else guess.best.cpu(),
        objective=best,
        evaluations=evaluations,
        seconds=time.perf_counter() - began,
        stop_reason=StopReason.CONVERGED if best < _FOUND else StopReason.STALLED,
        restarts=starts,
        details={"method": "severed", "why": f"layers above {cut.layer} draw at random"},
    )


class _Below:
    """The part of a network below a cut, with the signal that came back through it."""

    def __init__(self, problem: Problem, cut: Cut, knowledge: Knowledge, run: Run) -> None:
        target = problem.targets[0]
        self.model = copy.deepcopy(knowledge.model).double().to(run.device).eval().requires_grad_(False)
        self.state = {n: v.double().to(run.device) for n, v in {**target.parameters, **target.buffers}.items()}
        update = {name: value.double().to(run.device) for name, value in target.update.items()}
        self.signal, self.of_input = update[f"{cut.layer}.bias"], cut.kept is not None
        above = cut.layer.rsplit(".", 1)[0] + "."
        weight = update[f"{cut.layer}.weight"]
        if cut.kept is not None:
            sent = (weight != 0).any(0) / cut.kept
            self.signal = sent * (self.signal @ self.state[f"{cut.layer}.weight"])
        self.layer = self.model.get_submodule(cut.layer)
        own = (f"{cut.layer}.weight", f"{cut.layer}.bias")
        names = [name for name, _ in knowledge.model.named_parameters()]
        self.wanted = {n: update[n] for n in names[: names.index(own[0])] if above == "." or not n.startswith(above)}
        # The input of the layer itself, where the update tells it: exact for every kept one.
        place = int(update[own[1]].abs().argmax())
        self.features = weight[place] / update[own[1]][place] * (cut.kept or 1.0)
        self.known = (weight != 0).any(0)

    def gap(self, images: Tensor) -> Tensor:
        """Sum over tensors of the squared gap over the square of what was observed; of the layer's input too."""
        caught: list[Tensor] = []
        hook = self.layer.register_forward_hook(lambda module, inputs, output: caught.extend((inputs[0], output)))
        weights = {name: self.state[name].requires_grad_() for name in self.wanted}
        try:
            functional_call(self.model, {**self.state, **weights}, (images,))
        finally:
            hook.remove()
        features, output = caught
        loss = ((features if self.of_input else output)[0] * self.signal).sum()
        found = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        return _relative(dict(zip(weights, found, strict=True)), self.wanted) + _relative(
            {"features": features[0][self.known]}, {"features": self.features[self.known]}
        )


def _relative(found: Tensors, wanted: Mapping[str, Tensor]) -> Tensor:
    gaps = [(found[n] - v).square().sum() / v.square().sum().clamp(min=1e-30) for n, v in wanted.items()]
    return torch.stack(gaps).sum()


def _descend(gap: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, float, int]:
    """(images, gap, evaluations) after at most 600 evaluations of L-BFGS."""
    images = images.clone().requires_grad_()
    search = torch.optim.LBFGS([images], max_iter=600, max_eval=600, history_size=60, line_search_fn="strong_wolfe")
    search.param_groups[0].update(tolerance_grad=1e-12, tolerance_change=1e-14)
    count = 0

    def closure() -> Tensor:
        nonlocal count
        count += 1
        search.zero_grad()
        value = 1e3 * gap(images)
        value.backward()
        return value

    search.step(closure)
    with torch.enable_grad():
        last = float(gap(images).detach())
    return images.detach(), last, count


def alone(problems: Sequence[Problem]) -> bool:
    """Whether an observation's problems are one sample's single step."""
    return len(problems) == 1 and problems[0].samples == 1 and problems[0].targets[0].training.single
