"""Problems stacked, peeled together, and compared with what was observed."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge
from fedleak.attacks.chain import Linear
from fedleak.attacks.inversion.memory import free_memory
from fedleak.attacks.inversion.peeling.chain import Chain
from fedleak.attacks.inversion.peeling.recursion import ROUNDING, determined, last_delta, peel
from fedleak.attacks.problem import Problem, Target


@dataclass
class Peeled:
    """The images of a problem ``[B, C, H, W]``, their labels, and the distance of their gradients."""

    images: Tensor
    labels: Tensor
    objective: float
    relative: float
    seconds: float

    @staticmethod
    def join(parts: Sequence[Peeled]) -> Peeled:
        """Those of the samples of one observation."""
        images, labels = torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts])
        objective, seconds = sum(p.objective for p in parts), sum(p.seconds for p in parts)
        return Peeled(images, labels, objective, max(p.relative for p in parts), seconds)


class Peeler:
    """Peels problems of one model.

    Args:
        knowledge: the model and the image shape.
        device: where to compute.
    """

    def __init__(self, knowledge: Knowledge, device: torch.device | str) -> None:
        self.knowledge = knowledge
        self.device = torch.device(device)
        self._chains: dict[bool, Chain | None] = {}

    def chain(self, training_mode: bool) -> Chain | None:
        """The model as it runs in that mode, None where it is no chain."""
        if training_mode not in self._chains:
            model = copy.deepcopy(self.knowledge.model).cpu().train(training_mode)
            self._chains[training_mode] = Chain.read(model, self.knowledge.image_shape)
        return self._chains[training_mode]

    def all(self, problems: Sequence[Problem]) -> Iterator[tuple[Problem, Peeled]]:
        """Every supported problem with its images, chunk by chunk."""
        groups: dict[tuple[bool, int, bool], list[Problem]] = {}
        for problem in problems:
            mode = problem.targets[0].training.training_mode
            chain = self.chain(mode)
            if chain is not None and supported(problem, chain):
                key = (mode, problem.samples, problem.features is not None and problem.samples > 1)
                groups.setdefault(key, []).append(problem)
        for (mode, size, _), members in groups.items():
            chain = self.chain(mode)
            assert chain is not None
            chunk = max(1, int(_budget(self.device) // _bytes(chain, size)))
            for first in range(0, len(members), chunk):
                chosen = members[first : first + chunk]
                yield from zip(chosen, self._chunk(chain, size, chosen), strict=True)

    def relative(self, problem: Problem, images: Tensor, labels: Tensor) -> float:
        """‖∇W(x) − ∇W‖² / ‖∇W‖² at images ``[B, C, H, W]`` with labels ``[B]``, infinite where there is no chain."""
        (target,) = problem.targets
        chain = self.chain(target.training.training_mode)
        if chain is None:
            return torch.inf
        parameters, gradients = self._stacked(chain, [target])
        mine = chain.gradients(images[None].to(self.device).double(), labels[None].to(self.device), parameters)
        return float(_square({n: mine[n] - gradients[n] for n in mine}) / _square(gradients))

    def _stacked(self, chain: Chain, targets: Sequence[Target]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and gradients, name -> float64 ``[N, ...]``."""
        names = [name for name in targets[0].update if name in chain.parameter_names]

        def stack(each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
            found = {name: torch.stack([tensors[name].detach() for tensors in each]) for name in names}
            return {name: value.to(device=self.device, dtype=torch.float64) for name, value in found.items()}

        return stack([t.parameters for t in targets]), stack([t.update for t in targets])

    def _chunk(self, chain: Chain, size: int, problems: Sequence[Problem]) -> list[Peeled]:
        start = time.perf_counter()
        targets = [problem.targets[0] for problem in problems]
        parameters, gradients = self._stacked(chain, targets)
        from_weights = torch.tensor([_from_weights(t) for t in targets]).to(device=self.device, dtype=torch.float64)
        noise = {n: ROUNDING / 2 * (_size(g) + from_weights * _size(parameters[n])) for n, g in gradients.items()}
        finite = torch.isfinite(_square(gradients) + _square(parameters))
        for tensors in (gradients, parameters, noise):
            for name in tensors:
                tensors[name] = tensors[name].nan_to_num(0, 0, 0)
        if size == 1:
            own = last_delta(chain.last, parameters, gradients).argmin(1, keepdim=True)
            guesses = [None if p.labels is None else p.labels[0].to(own) for p in problems]
            labels = torch.stack([o if g is None else g for o, g in zip(own, guesses, strict=True)])
            images = peel(chain, parameters, gradients, noise)
        else:
            labels = torch.stack([p.labels[0] for p in problems if p.labels is not None]).to(self.device)
            known = [p.features for p in problems if p.features is not None]
            features = torch.stack(known).to(device=self.device, dtype=torch.float64) if known else None
            images = peel(chain, parameters, gradients, noise, labels, features)
        images = images.nan_to_num(0.5).clamp(0, 1).float()
        mine = chain.gradients(images.double(), labels, parameters)
        objective = _square({name: mine[name] - gradient for name, gradient in gradients.items()})
        objective = torch.where(finite, objective, torch.nan)
        relative = objective / _square(gradients)
        seconds = (time.perf_counter() - start) / len(problems)
        return [
            Peeled(x.cpu(), y.cpu(), float(o), float(r), seconds)
            for x, y, o, r in zip(images, labels, objective, relative, strict=True)
        ]


def supported(problem: Problem, chain: Chain) -> bool:
    """Whether the closed form has an answer: one step's gradient of one sample, or of a small batch of known labels."""
    target = problem.targets[0]
    if len(problem.targets) > 1 or not target.training.single or target.imitate is not None:
        return False
    size, classes, features = problem.samples, chain.last.out_shape[0], chain.last.shape[0]
    known = problem.labels is not None and chain.last.bias is not None and len(chain.layers) > 1
    return size == 1 or (known and 2 * size <= classes and size <= features)


def _from_weights(target: Target) -> float:
    """The rounding of a parameter, in units of its gradient, where new weights were sent."""
    return 1 / (target.training.scale or 1.0) if target.training.payload == "weights" else 0.0


def _size(values: Tensor) -> Tensor:
    """Root mean square of each problem, ``[N]``."""
    return values.flatten(1).square().mean(1).sqrt()


def _square(tensors: Mapping[str, Tensor]) -> Tensor:
    """‖·‖² of each problem, ``[N]``."""
    return torch.stack([value.flatten(1).square().sum(1) for value in tensors.values()]).sum(0)


def _budget(device: torch.device) -> float:
    """Bytes to use at once: a CPU gains nothing from more, since one dense factorisation keeps it busy."""
    half = free_memory(device) / 2
    return min(half, 2e8) if device.type == "cpu" else half


def _bytes(chain: Chain, batch: int) -> int:
    """Memory that one problem needs, at the layer that needs most."""
    numbers = 0
    for layer in reversed(chain.layers):
        if not isinstance(layer, Linear) or (batch > 1 and layer is chain.last):
            continue
        tall = layer.tall(batch)
        taps, positions = tall.taps.shape
        inputs, outputs = tall.shape[0] * tall.pixels, tall.out_shape[0] * positions
        if not determined(tall) and layer is not chain.last:
            patches = layer.shape[0] * taps
            numbers = max(numbers, 2 * outputs // batch * patches * positions // batch + 4 * outputs**2 // batch)
            break
        primal = 3 * inputs**2 + 2 * positions * (layer.shape[0] * taps) ** 2
        dual = 3 * outputs**2 + 2 * (taps * positions) ** 2
        numbers = max(numbers, (primal if inputs <= outputs else dual) + 3 * tall.pixels**2)
    return 8 * numbers
