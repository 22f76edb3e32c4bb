"""DLG's published procedure, all networks at once, against the same one at a time: the same rows, and how much faster?

    python benchmarks/published.py --networks 50 --steps 100 --dtype float64 --output published.csv

One at a time is `torch.optim.LBFGS` around plain automatic differentiation, as the public code of DLG and iDLG has it.
At once is `GradientMatching` with ``LBFGS(rests=True)`` and the stopping rule `AsPublished`. Victims are fresh sigmoid
LeNets with weights U(−0.5, 0.5) and a made-up smooth image each, so that no data is needed.

Columns, of either way (``_one``, ``_all``): `evaluations`; `objective` and `mse`, the lowest objective on the way and
the error of the image there, cut to [0, 1]; `label`, that of the last step; and `right`, the true label. The last line
is the number of evaluations in a CPU second of either way, and their ratio.

L-BFGS without a line search is chaotic on this objective: what differs in the sixteenth digit at the first evaluation
differs in the second at the hundredth. ``--control`` says how much that makes: it compares the published procedure with
itself, begun 1e-15 beside.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedleak.attacks.base import Knowledge, Run
from fedleak.attacks.inversion import LBFGS, AsPublished, GradientMatching, Normal
from fedleak.attacks.inversion.starts import first_point
from fedleak.attacks.problem import Problem, pose
from fedleak.capture import Observation
from fedleak.training import SGD, LocalTraining

SHAPE, CLASSES, TOLERANCE, EVALUATIONS = (1, 28, 28), 10, 1e-6, 20


def lenet() -> nn.Module:
    """The LeNet of DLG and iDLG."""
    layers: list[nn.Module] = []
    for channels, stride in ((1, 2), (12, 2), (12, 1)):
        layers += [nn.Conv2d(channels, 12, 5, stride, 2), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(588, CLASSES))


def victim(number: int, dtype: torch.dtype) -> tuple[Observation, Tensor, int]:
    """The gradient of a fresh network on one image ``[1, 1, 28, 28]``; the image, and its label."""
    generator = torch.Generator().manual_seed(number)
    model = lenet()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    image = nn.functional.interpolate(torch.rand(1, 1, 7, 7, generator=generator), size=28, mode="bilinear")
    label = torch.randint(CLASSES, (1,), generator=generator)
    model, image = model.to(dtype), image.to(dtype)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradient = torch.autograd.grad(nn.functional.cross_entropy(model(image), label), parameters)
    start = {name: value.detach() for name, value in zip(names, parameters, strict=True)}
    training = LocalTraining("gradient", 1, 1, optimizer=SGD(0.1))
    return Observation(number + 1, 0, start, dict(zip(names, gradient, strict=True)), training), image, int(label)


def one_at_a_time(
    observation: Observation, problem: Problem, image: Tensor, steps: int, dtype: torch.dtype, nudge: float = 0.0
) -> dict[str, Any]:
    """The public code's loop on one network, from its start or `nudge` beside."""
    model = lenet().to(dtype)
    model.load_state_dict({name: value.to(dtype) for name, value in observation.parameters.items()})
    target = [value.to(dtype) for value in observation.gradient().values()]
    x, logits = (v.to(dtype).clone() for v in first_point(Normal(), problem, 0, SHAPE, CLASSES, seed=0))
    x += nudge
    leaves = [x.requires_grad_(), logits.requires_grad_()]
    optimizer = torch.optim.LBFGS(leaves, lr=1)
    evaluations, best, error = 0, float("inf"), float("nan")

    def closure() -> Tensor:
        nonlocal evaluations, best, error
        evaluations += 1
        optimizer.zero_grad()
        loss = -(torch.softmax(logits, -1) * torch.log_softmax(model(x), -1)).sum(-1).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        distance = torch.stack([(g - t).square().sum() for g, t in zip(gradients, target, strict=True)]).sum()
        distance.backward()
        if float(distance.detach()) < best:
            best, error = float(distance.detach()), float((x.detach().clamp(0, 1) - image).square().mean())
        return distance.detach()

    for _ in range(steps):
        optimizer.step(closure)
        if float(closure()) < TOLERANCE:
            break
    return {"evaluations": evaluations, "objective": best, "mse": error, "label": int(logits.argmax())}


def compare(
    networks: int, single: int, steps: int, dtype: str, control: bool = False
) -> tuple[list[dict[str, Any]], float, float]:
    """Rows of the first `single` networks, and the evaluations in a CPU second, one at a time and all at once."""
    victims = [victim(number, getattr(torch, dtype)) for number in range(networks)]
    observations, knowledge = [o for o, _, _ in victims], Knowledge(lenet(), SHAPE, CLASSES)
    matching = GradientMatching(
        optimizer=LBFGS(rests=True),
        stopping=AsPublished(max_evaluations=EVALUATIONS * steps + 1, tolerance=TOLERANCE),
        objective_scale=1.0,
        restarts=1,
        chunk_size=64,
        dtype=dtype,  # type: ignore[arg-type]
    )
    began = time.process_time()
    found = matching.invert(observations, [None] * networks, knowledge, Run())
    batched = sum(f.evaluations for f in found) / (time.process_time() - began)
    rows: list[dict[str, Any]] = []
    began = time.process_time()
    for (observation, image, label), problem, f in zip(
        victims[:single], pose(observations, [None] * networks, knowledge), found, strict=False
    ):
        one = one_at_a_time(observation, problem, image, steps, getattr(torch, dtype))
        mse, last = float((f.images - image).square().mean()), int(f.details["last_labels"])
        both = {"evaluations": f.evaluations, "objective": f.objective, "mse": mse, "label": last}
        if control:
            both = one_at_a_time(observation, problem, image, steps, getattr(torch, dtype), nudge=1e-15)
        row: dict[str, Any] = {"network": len(rows), "right": label}
        for name, value in one.items():
            row |= {f"{name}_one": value, f"{name}_all": both[name]}
        rows.append(row)
    return rows, sum(row["evaluations_one"] for row in rows) / (time.process_time() - began), batched


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=50, help="networks in the call that takes all at once")
    parser.add_argument("--single", type=int, help="of them, how many are run one at a time too (default: all)")
    parser.add_argument("--steps", type=int, default=300, help="outer steps of 20 evaluations")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--output", type=Path, help="a CSV file for the rows")
    parser.add_argument("--control", action="store_true", help="one at a time against itself, begun a little beside")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, alone, batched = compare(
        given.networks, given.single or given.networks, given.steps, given.dtype, given.control
    )
    for name, same in (
        ("label of the last step", [row["label_one"] == row["label_all"] for row in rows]),
        ("image recovered (MSE < 1e-3) or not", [(row["mse_one"] < 1e-3) == (row["mse_all"] < 1e-3) for row in rows]),
        ("error within 1%", [abs(row["mse_one"] - row["mse_all"]) <= 0.01 * row["mse_one"] for row in rows]),
    ):
        print(f"{name}: the same in {sum(same)} of {len(rows)}")
    if not given.control:
        print(f"evaluations in a CPU second: {alone:.0f} one at a time, {batched:.0f} at once; {batched / alone:.1f} ×")
    if given.output is not None:
        with given.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
