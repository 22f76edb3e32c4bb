"""What a problem costs, in time and memory, as more are solved at once: gradient matching and the closed form.

    python benchmarks/scaling.py --victims 1,4,16,64,256,1024 --shared --output scaling.csv

Victims are random images behind fresh MNIST- and CIFAR-100-shaped LeNets with weights U(-0.5, 0.5), so no data is
needed; `--shared` adds rows in which all victims start from the same network. Gradient matching runs with the settings
recommended at batch size 1, but every start for exactly `--evaluations` evaluations: what is measured is the price of
an evaluation, not whether the image comes back (that is `inversion.py`). Every row is measured in a process of its
own, after a call on one victim that is not counted: the median of as many calls as fit into a second (5 at most).

The CSV has a row per setting, method, kind of weights, number of victims and number of restarts:

method                          `gradient_matching`, or `closed_form` (peeling, which does without evaluations)
evaluations                     objective-and-gradient evaluations of the call, all problems together
seconds                         of the call, from observations to reconstructions on the CPU
seconds_per_victim              seconds / victims
seconds_per_problem_evaluation  seconds / evaluations
ratio_to_one                    seconds per victim and restart, divided by those of the smallest call of its kind
                                (`--victims` begins with 1 unless told otherwise)
peak_mebibytes                  most memory held during the call beyond what was held before it: on a GPU what the
                                allocator gave out, on a CPU the process's resident set
chunk                           most problems held at once
gflops_achieved                 10⁹ FLOPs of the call a second; an evaluation is charged with the products
                                of the model's layers (`evaluation_flops`), though the engine avoids some in the last
                                layer; all other work, the optimiser's above all, counts as time only
gflops_peak                     of a large float32 matrix product on the same device and threads: the ceiling
share_of_peak                   gflops_achieved / gflops_peak

A device is saturated at the smallest number of victims whose cost is within 10% of the best. Needs torch and numpy.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation
sys.path.insert(0, str(Path(__file__).resolve().parent))

from inversion import SETTINGS, Setting, say

from fedleak.attacks.base import Inversion, Knowledge, LabelGuess, Run
from fedleak.attacks.inversion.distances import Distance
from fedleak.attacks.inversion.gradient_matching import GradientMatching
from fedleak.attacks.inversion.objectives import L2
from fedleak.attacks.inversion.optimizers import LBFGS
from fedleak.attacks.inversion.peeling import Peeling
from fedleak.capture import Observation
from fedleak.models.lenet import LeNet
from fedleak.training import LocalTraining

MOST_CALLS = 5
SATURATED = 1.1


@dataclass(frozen=True)
class Row:
    """A row of the CSV; see the head of this file."""

    setting: str
    method: str
    weights: str
    victims: int
    restarts: int
    evaluations: int = 0
    seconds: float = math.nan
    seconds_per_victim: float = math.nan
    seconds_per_problem_evaluation: float = math.nan
    ratio_to_one: float = math.nan
    peak_mebibytes: float = math.nan
    chunk: int = 0
    gflops_achieved: float = math.nan
    gflops_peak: float = math.nan
    share_of_peak: float = math.nan

    @property
    def cost(self) -> float:
        """Seconds per victim and restart."""
        return self.seconds_per_victim / self.restarts


class Counted(GradientMatching):
    """Gradient matching that notes how many problems it held at once, at most, in `chunk`."""

    chunk = 0

    def _distance(self, *arguments: Any) -> Distance:
        distance = super()._distance(*arguments)
        evaluate = distance.evaluate

        def noted(rows: dict[str, Tensor], images: Tensor, *others: Any, **options: Any) -> Any:
            result = evaluate(rows, images, *others, **options)
            self.chunk = max(self.chunk, len(images))
            return result

        distance.evaluate = noted  # type: ignore[method-assign]
        return distance


def matching(restarts: int, evaluations: int, chunk_size: int | None = None) -> Counted:
    """The recommended gradient matching, with nothing that ends a start before its budget."""
    return Counted(
        objective=L2(relative=True),
        start="grey",
        smoothness=1.0,
        optimizer=LBFGS(max_step=1.0),
        restarts=restarts,
        max_evaluations=evaluations,
        tolerance=-1.0,
        patience=evaluations + 1,
        limit=math.inf,
        chunk_size=chunk_size,
    )


def make_victims(setting: Setting, count: int, shared: bool, seed: int) -> tuple[list[Observation], list[LabelGuess]]:
    """Updates of `count` clients with one random image each, on the CPU, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    model = LeNet(setting.shape, setting.classes)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def network() -> dict[str, Tensor]:
        return {name: torch.rand(shape, generator=generator) - 0.5 for name, shape in shapes.items()}

    common, observations, guesses = network(), [], []
    for number in range(count):
        parameters = common if shared else network()
        image, label = torch.rand(1, *setting.shape, generator=generator), torch.tensor([number % setting.classes])
        leaves = {name: value.requires_grad_() for name, value in parameters.items()}
        loss = F.cross_entropy(torch.func.functional_call(model, leaves, image), label)
        update = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        start = {name: value.detach() for name, value in parameters.items()}
        observations.append(Observation(1, number, start, update, LocalTraining(batch_size=1, local_steps=1)))
        guesses.append(LabelGuess(label[None], torch.ones(1)))
    return observations, guesses


def evaluation_flops(setting: Setting) -> int:
    """FLOPs of one evaluation for one image: two for each multiplication and addition of a layer's products.

    A layer takes seven products, each as large as its forward pass: that pass; the derivatives of the loss with respect
    to its weights and to its input; and those of the objective with respect to both factors of either. The first layer
    takes five, since nothing asks for the loss's derivative with respect to the image.
    """
    model = LeNet(setting.shape, setting.classes)
    products: list[int] = []
    for layer in (*model.body, model.fc):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            taps = layer.weight[0].numel()
            layer.register_forward_hook(lambda _, __, output, taps=taps: products.append(output.numel() * taps))
    model(torch.zeros(1, *setting.shape))
    return 2 * (7 * sum(products) - 2 * products[0])


def synchronize(device: str) -> None:
    """Wait until the device is idle."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_flops(device: str) -> float:
    """FLOPs a second of the best of ten large float32 matrix products."""
    size = 8192 if device.startswith("cuda") else 2048
    a, b = torch.rand(size, size, device=device), torch.rand(size, size, device=device)
    best = math.inf
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def held_now() -> int:
    """Bytes this process holds in memory; the most it ever held where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return held_most()


def held_most() -> int:
    """The most bytes this process ever held in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def timed(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds of the median call, and what the last one returned."""
    times: list[float] = []
    while not times or (sum(times) < 1 and len(times) < MOST_CALLS):
        synchronize(device)
        began = time.perf_counter()
        result = call()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times), result


def measure(row: Row, options: argparse.Namespace) -> Row:
    """Fill in what one row measures. Call it in a fresh process: on a CPU peak memory is the process's."""
    setting, device = SETTINGS[row.setting], options.device
    cuda = device.startswith("cuda")
    observations, guesses = make_victims(setting, row.victims, row.weights == "shared", options.seed)
    knowledge = Knowledge(LeNet(setting.shape, setting.classes), setting.shape, setting.classes)
    inversion: Inversion = Peeling(tolerance=math.inf)
    warm: Inversion = inversion
    if row.method == "gradient_matching":
        inversion = matching(row.restarts, options.evaluations, options.chunk_size)
        warm = matching(1, 2)
    run = Run(device, options.seed)
    warm.invert(observations[:1], guesses[:1], knowledge, run)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else held_now()
    seconds, results = timed(lambda: inversion.invert(observations, guesses, knowledge, run), device)
    peak = (torch.cuda.max_memory_allocated(device) if cuda else held_most()) - before
    row = replace(row, seconds=seconds, seconds_per_victim=seconds / row.victims, peak_mebibytes=peak / 2**20)
    if not isinstance(inversion, Counted):
        return row
    evaluations = sum(result.evaluations for result in results)
    return replace(
        row,
        evaluations=evaluations,
        seconds_per_problem_evaluation=seconds / evaluations,
        chunk=inversion.chunk,
        gflops_achieved=evaluations * evaluation_flops(setting) / seconds / 1e9,
    )


def _child(sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    sender.send(work(*arguments))


def apart(work: Callable[..., Any], *arguments: Any, threads: int) -> Any:
    """What `work` returns, done in a process of its own; None where the system killed that (for its memory, say)."""
    # A fork saves importing torch again, and is safe as long as this process computes nothing itself.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, work, arguments, threads))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    process.join()
    if process.exitcode is not None and process.exitcode > 0:
        sys.exit(f"{work.__name__} failed; see above")
    return result


def plan(options: argparse.Namespace) -> Iterator[Row]:
    """The rows to measure: every method and kind of weights against victims, gradient matching against restarts."""
    for setting in options.setting or ("mnist", "cifar100"):
        for weights in ("own", "shared") if options.shared else ("own",):
            for victims in options.victims:
                yield Row(setting, "gradient_matching", weights, victims, 1)
            for restarts in options.restarts:
                if restarts > 1 or options.restart_victims not in options.victims:
                    yield Row(setting, "gradient_matching", weights, options.restart_victims, restarts)
            for victims in options.victims:
                if victims <= options.closed_form_victims:
                    yield Row(setting, "closed_form", weights, victims, 1)


def compared(rows: Sequence[Row], peak: float) -> list[Row]:
    """The rows with their ratios, to the smallest call of their kind and to the device's `peak` FLOPs a second."""
    first: dict[tuple[str, ...], Row] = {}
    for row in rows:
        kind = (row.setting, row.method, row.weights)
        if kind not in first or (row.restarts, row.victims) < (first[kind].restarts, first[kind].victims):
            first[kind] = row
    result = []
    for row in rows:
        row = replace(row, ratio_to_one=row.cost / first[row.setting, row.method, row.weights].cost)
        if row.evaluations:
            row = replace(row, gflops_peak=peak / 1e9, share_of_peak=row.gflops_achieved * 1e9 / peak)
        result.append(row)
    return result


def saturation(rows: Sequence[Row]) -> list[str]:
    """A line for each kind of call: from how many victims on more of them make a victim no cheaper."""
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.restarts == 1:
            kinds.setdefault((row.setting, row.method, row.weights), []).append(row)
    lines = []
    for kind, members in kinds.items():
        best = min(row.cost for row in members)
        at = min((row for row in members if row.cost <= SATURATED * best), key=lambda row: row.victims)
        largest = max(row.victims for row in members)
        end = ", the largest measured: it may go on" if at.victims == largest and len(members) > 1 else ""
        lines.append(f"{', '.join(kind)} weights: saturated at {at.victims} victims ({at.cost:.3g} s each){end}")
    return lines


def text(value: object, digits: int) -> str:
    """A cell; empty where nothing was measured."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.{digits}g}"
    return str(value)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    names = [field.name for field in fields(Row)]
    heads = {
        "seconds_per_victim": "s/victim",
        "seconds_per_problem_evaluation": "s/evaluation",
        "ratio_to_one": "ratio",
        "peak_mebibytes": "MiB",
        "gflops_achieved": "gflops",
        "gflops_peak": "peak",
        "share_of_peak": "share",
    }
    lines = [[heads.get(name, name) for name in names]]
    lines += [[text(value, 3) for value in asdict(row).values()] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def write(rows: Sequence[Row], path: Path) -> None:
    """The rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        for row in rows:
            writer.writerow(text(value, 6) for value in asdict(row).values())


def numbers(text: str) -> list[int]:
    """Positive whole numbers between commas."""
    found = sorted({int(part) for part in text.split(",")})
    if found[0] < 1:
        raise ValueError
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time and memory against the number of victims and of restarts.")
    parser.add_argument("--victims", type=numbers, help="such as 1,4,16 (default: to 256 on a CPU, 4096 on a GPU)")
    parser.add_argument("--restarts", type=numbers, default=[1, 2, 4, 8], help="such as 1,2,4 (default: 1,2,4,8)")
    parser.add_argument("--restart-victims", type=int, default=16, help="victims in the rows against restarts")
    parser.add_argument("--evaluations", type=int, default=30, help="for every start")
    parser.add_argument("--shared", action="store_true", help="also with one network for all victims")
    parser.add_argument("--setting", choices=("mnist", "cifar100"), action="append", help="may be repeated")
    parser.add_argument(
        "--closed-form-victims", type=int, help="the most for the closed form (default: 16 on a CPU); 0 leaves it out"
    )
    parser.add_argument("--chunk-size", type=int, help="problems at once (default: what memory holds)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="the CSV to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.victims is None:
        options.victims = numbers("1,4,16,64,256,1024,4096" if options.device.startswith("cuda") else "1,4,16,64,256")
    if options.closed_form_victims is None:
        options.closed_form_victims = options.victims[-1] if options.device.startswith("cuda") else 16
    if min(options.evaluations, options.restart_victims, options.threads, options.chunk_size or 1) < 1:
        parser.error("--evaluations, --restart-victims, --threads and --chunk-size must be at least 1")
    peak = apart(peak_flops, options.device, threads=options.threads)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, {peak / 1e9:.0f} gflops at best")
    rows: list[Row] = []
    for wanted in plan(options):
        row = apart(measure, wanted, options, threads=options.threads)
        what = f"{wanted.setting} {wanted.method} {wanted.weights}: {wanted.victims} victims × {wanted.restarts}"
        if row is None:
            say(f"{what}: killed, left out")
            continue
        say(f"{what}: {row.seconds:.3g} s")
        rows = compared([*rows, row], peak)
        if options.output:
            write(rows, options.output)
    print(table(rows))
    print(*saturation(rows), sep="\n")


if __name__ == "__main__":
    main()
