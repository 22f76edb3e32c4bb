"""How fast and how often images come back: the procedure of the DLG and iDLG papers against fedleak's engine.

    python benchmarks/inversion.py --data DIR --victims 32 --seed 0 --setting cifar100 --output inversion.csv

Each victim has a fresh LeNet with weights U(-0.5, 0.5); both methods attack the same gradients in the same run. An
image is recovered if its MSE to the truth is below 1e-3, after the assignment of a batch's images to the truth that is
best in total. DIR holds `mnist/` (the idx files, packed or not, at any depth) and `cifar100/` (a folder a class).

plain: one victim at a time, one start: `torch.optim.LBFGS` (lr 1, max_iter 20) on the squared distance of the
gradients from a standard normal image, up to 300 steps, stopping below 1e-6 (looked at every 10 steps); the label by
the sign rule at batch size 1, known labels in batches (as for the engine).

engine: all victims in one call, images found in closed form where that passes its check, and by batched gradient
matching with restarts where not. For mnist-b8, mnist-b16 (granted 1,024 other images) and cifar100-noise (noise of 1e-3
on every element, not told) it is `attack=map`: the most likely images under a prior.

cnn (MNIST, the tutorials' network), convnet and resnet18 (CIFAR-10, BatchNorm in evaluation mode) are initialised as
PyTorch does it and attacked with the public settings of Inverting Gradients (Geiping 2020): the angle of the gradients,
total variation 1e-2, `--steps` signed Adam steps from a normal image, kept in [0, 1]. plain is that as a loop over one
victim at a time, engine our preset of it on all victims in one call; for cnn a third row, fedleak, is our own best.

The CSV has a row per setting and method. `victims`: updates attacked; `success_rate`: recovered images / images;
`evaluations`: objective-and-gradient evaluations, the median over updates of which every image was recovered;
`seconds`: from updates to images; `ratio`: successes a second, divided by plain's; `rate`: evaluations a second of all
updates; `rate_ratio`: divided by plain's; `median_mse`: over images, assigned as is best in total. Needs torch and
numpy, for CIFAR Pillow or torchvision, and for resnet18 torchvision.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from fedleak.attacks.base import Inversion, Knowledge, LabelGuess, Run
from fedleak.attacks.inversion.chooser import Chooser
from fedleak.attacks.inversion.gradient_matching import GradientMatching
from fedleak.attacks.inversion.map import MAP
from fedleak.attacks.inversion.objectives import Cosine
from fedleak.attacks.inversion.optimizers import Adam
from fedleak.attacks.inversion.peeling import Peeling
from fedleak.attacks.inversion.priors import TotalVariation
from fedleak.attacks.inversion.stopping import Stopping
from fedleak.attacks.results import Progress
from fedleak.capture import Observation
from fedleak.models.cnn import CNN, ConvNet
from fedleak.models.lenet import LeNet
from fedleak.training import LocalTraining

clock = time.perf_counter
"""What is called a second."""
SUCCESS = 1e-3
STEPS = 300


@dataclass(frozen=True)
class Setting:
    """Which images, how many in a batch, and what stands between them and the attacker.

    Attributes:
        data, shape, classes: of the images.
        batch_size: images behind an update.
        auxiliary: other images of the same data set that the engine is granted; then its prior is theirs.
        noise: standard deviation of the noise on every element of the update; the engine is not told.
        likely: whether the engine is the most likely images (`MAP`) instead of the closed form and matching.
        model: lenet, or a network that Inverting Gradients' settings are for.
        steps: of these.
    """

    data: str
    shape: tuple[int, int, int]
    classes: int
    batch_size: int
    auxiliary: int = 0
    noise: float = 0.0
    likely: bool = False
    model: str = "lenet"
    steps: int = 2400

    def network(self) -> nn.Module:
        """As PyTorch initialises it."""
        if self.model == "resnet18":
            from fedleak.models.vision import resnet18  # torchvision, which the other settings do without

            return resnet18(self.classes, stem="small").eval()
        kinds = {"lenet": LeNet, "cnn": CNN, "convnet": ConvNet}
        return kinds[self.model](self.shape, self.classes).eval()


SETTINGS = {
    "mnist": Setting("mnist", (1, 28, 28), 10, 1),
    "cifar100": Setting("cifar100", (3, 32, 32), 100, 1),
    "cifar100-b4": Setting("cifar100", (3, 32, 32), 100, 4),
    "cifar100-b8": Setting("cifar100", (3, 32, 32), 100, 8),
    "cifar100-b16": Setting("cifar100", (3, 32, 32), 100, 16),
    "cifar100-noise": Setting("cifar100", (3, 32, 32), 100, 1, noise=1e-3, likely=True),
    "mnist-b8": Setting("mnist", (1, 28, 28), 10, 8, auxiliary=1024, likely=True),
    "mnist-b16": Setting("mnist", (1, 28, 28), 10, 16, auxiliary=1024, likely=True),
    "cnn": Setting("mnist", (1, 28, 28), 10, 1, model="cnn"),
    "convnet": Setting("cifar10", (3, 32, 32), 10, 1, model="convnet"),
    "resnet18": Setting("cifar10", (3, 32, 32), 10, 1, model="resnet18"),
}
LENETS = [name for name, setting in SETTINGS.items() if setting.model == "lenet"]


@dataclass(frozen=True)
class Victim:
    """An update and the truth behind it: images ``[B, C, H, W]`` in [0, 1] and labels ``[B]``."""

    observation: Observation
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Row:
    """A row of the CSV."""

    setting: str
    method: str
    victims: int
    success_rate: float
    evaluations: float
    seconds: float
    successes_per_second: float
    ratio: float
    rate: float
    rate_ratio: float
    median_mse: float


def read_idx(path: Path) -> np.ndarray:
    """The array in an MNIST file, gzipped or not."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dimensions = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def read_png(path: Path) -> Tensor:
    """An RGB image ``[3, H, W]``, uint8."""
    try:
        from PIL import Image
    except ImportError:
        from torchvision.io import ImageReadMode, read_image

        return read_image(str(path), ImageReadMode.RGB)
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


class Images:
    """The images of a dataset, read when asked for."""

    def __init__(self, folder: Path, name: str) -> None:
        self.pixels: np.ndarray | None = None
        if name == "mnist":
            pixels = sorted(folder.rglob("*images-idx3-ubyte*"))
            labels = sorted(folder.rglob("*labels-idx1-ubyte*"))
            if not pixels or not labels:
                sys.exit(
                    f"--data: no *-idx3-ubyte and *-idx1-ubyte files in {folder}; give the folder that holds mnist/"
                )
            self.pixels, self.labels = read_idx(pixels[0]), read_idx(labels[0]).astype(np.int64)
            return
        classes = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        self.files = [(file, label) for label, path in enumerate(classes) for file in sorted(path.glob("*.png"))]
        if not self.files:
            sys.exit(f"--data: no class folders with .png images in {folder}; give the folder that holds {name}/")
        self.labels = np.array([label for _, label in self.files])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.pixels is not None:
            image = torch.from_numpy(self.pixels[index].copy())[None]
        else:
            image = read_png(self.files[index][0])
        return image.float() / 255, int(self.labels[index])


def make_victims(setting: Setting, images: Images, count: int, seed: int, device: str) -> list[Victim]:
    """Updates of `count` clients, each with a network and a batch of its own; float32."""
    victims = []
    for number in range(count):
        order = np.random.default_rng((seed, number)).choice(len(images), setting.batch_size, replace=False)
        pairs = [images[int(index)] for index in order]
        x, y = torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        with torch.random.fork_rng():
            torch.manual_seed(1_000_003 * seed + number)
            model = setting.network()
        if setting.model == "lenet":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.uniform_(-0.5, 0.5, generator=generator)
        model = model.to(device)
        names, parameters = zip(*model.named_parameters(), strict=True)
        loss = F.cross_entropy(model(x.to(device)), y.to(device))
        update = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        if setting.noise:
            drawn = (setting.noise * torch.randn(v.shape, generator=generator) for v in update.values())
            update = {n: v + noise.to(device) for (n, v), noise in zip(update.items(), drawn, strict=True)}
        start = {name: value.detach().clone() for name, value in zip(names, parameters, strict=True)}
        training = LocalTraining(batch_size=len(y), local_steps=1, training_mode=False)
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        labels = y.sort().values if len(y) > 1 else None
        observation = Observation(1, number, start, update, training, labels=labels, start_buffers=buffers)
        victims.append(Victim(observation, x, y))
    return victims


def sign_rule(observation: Observation) -> LabelGuess:
    """The label of a single sample: the one class of which the last bias's gradient is negative."""
    label = list(observation.update.values())[-1].argmin()
    return LabelGuess(label.cpu().view(1, 1), torch.ones(1))


def guess(observation: Observation) -> LabelGuess:
    """The labels both methods use: known in batches, inferred at batch size 1."""
    if observation.labels is None:
        return sign_rule(observation)
    return LabelGuess(observation.labels[None], torch.ones(1))


def plain(victim: Victim, setting: Setting, device: str, generator: torch.Generator) -> tuple[Tensor, int]:
    """The papers' procedure on one victim: images ``[B, C, H, W]`` and the number of evaluations."""
    model = LeNet(setting.shape, setting.classes).to(device)
    model.load_state_dict(dict(victim.observation.parameters))
    wanted = list(victim.observation.update.values())
    labels = guess(victim.observation).best.to(device)
    dummy = torch.randn(len(labels), *setting.shape, generator=generator).to(device).requires_grad_()
    optimizer = torch.optim.LBFGS([dummy], lr=1.0, max_iter=20)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = F.cross_entropy(model(dummy), labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        distance = torch.stack([(g - w).square().sum() for g, w in zip(gradients, wanted, strict=True)]).sum()
        (dummy.grad,) = torch.autograd.grad(distance, dummy)
        return distance.detach()

    for step in range(STEPS):
        optimizer.step(closure)
        if step % 10 == 0 and float(closure()) < 1e-6:
            break
    return dummy.detach().cpu(), evaluations


def published(victim: Victim, setting: Setting, device: str, generator: torch.Generator) -> tuple[Tensor, int]:
    """Inverting Gradients' public settings on one victim, as a loop: images ``[1, C, H, W]`` and evaluations."""
    model = setting.network().to(device)
    model.load_state_dict({**victim.observation.parameters, **victim.observation.start_buffers})
    wanted, labels = list(victim.observation.update.values()), guess(victim.observation).best.to(device)
    size = torch.stack([w.square().sum() for w in wanted]).sum().sqrt()
    dummy = torch.randn(1, *setting.shape, generator=generator).to(device).requires_grad_()
    optimizer = torch.optim.Adam([dummy], lr=0.1)
    drops = [int(setting.steps * share / 8) for share in (3, 5, 7)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)
    best, kept = math.inf, dummy.detach().clone()
    for _ in range(setting.steps):
        loss = F.cross_entropy(model(dummy), labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        dot = torch.stack([(g * w).sum() for g, w in zip(gradients, wanted, strict=True)]).sum()
        angle = 1 - dot / size / torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        edges = dummy.diff(dim=2).abs().mean() + dummy.diff(dim=3).abs().mean()
        (slope,) = torch.autograd.grad(angle + 1e-2 * edges, dummy)
        if angle.item() < best:
            best, kept = angle.item(), dummy.detach().clone()
        dummy.grad = slope.sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            dummy.clamp_(0, 1)
    return kept.cpu(), setting.steps


def errors(found: Tensor, truth: Tensor) -> np.ndarray:
    """Each image's MSE ``[B]``, assigned to the truth as is best in total."""
    cost = (found.clamp(0, 1)[:, None] - truth[None]).double().square().flatten(2).mean(2).nan_to_num(1e3).numpy()
    return np.asarray(cost[np.arange(len(cost)), assigned(cost)])


def recovered(found: Tensor, truth: Tensor) -> int:
    """How many of a batch's images have an MSE below `SUCCESS`, assigned to the truth as is best in total."""
    return int((errors(found, truth) < SUCCESS).sum())


def assigned(cost: np.ndarray) -> np.ndarray:
    """The column of each row ``[B]`` for which the sum over a square matrix is least (Hungarian algorithm)."""
    size = len(cost)
    rows, columns = np.zeros(size + 1), np.zeros(size + 1)
    owner = np.zeros(size + 1, int)  # of each column, rows counted from 1
    for row in range(1, size + 1):
        owner[0], column = row, 0
        least, before, seen = np.full(size + 1, np.inf), np.zeros(size + 1, int), np.zeros(size + 1, bool)
        while owner[column]:
            seen[column] = True
            reduced = cost[owner[column] - 1] - rows[owner[column]] - columns[1:]
            closer = ~seen[1:] & (reduced < least[1:])
            least[1:][closer], before[1:][closer] = reduced[closer], column
            following = int(np.where(seen, np.inf, least).argmin())
            step = least[following]
            rows[owner[seen]] += step
            columns[seen] -= step
            least[~seen] -= step
            column = following
        while column:
            owner[column] = owner[before[column]]
            column = before[column]
    result = np.zeros(size, int)
    result[owner[1:] - 1] = np.arange(size)
    return result


def row(setting: str, method: str, found: Sequence[np.ndarray], evaluations: Sequence[int], seconds: float) -> Row:
    """Sums up a method's errors, an array a victim; the ratios are filled in later."""
    hits = [int((one < SUCCESS).sum()) for one in found]
    whole = [e for e, hit, one in zip(evaluations, hits, found, strict=True) if hit == len(one)]
    return Row(
        setting,
        method,
        len(hits),
        sum(hits) / sum(len(one) for one in found),
        float(np.median(whole)) if whole else math.nan,
        seconds,
        sum(hits) / seconds,
        1.0,
        sum(evaluations) / seconds,
        1.0,
        float(np.median(np.concatenate(found))),
    )


def run_plain(name: str, setting: Setting, victims: Sequence[Victim], device: str, seed: int) -> Row:
    """Time the plain baseline."""
    generator = torch.Generator().manual_seed(seed)
    found, evaluations, seconds = [], [], 0.0
    loop = plain if setting.model == "lenet" else published
    for number, victim in enumerate(victims, 1):
        start = clock()
        images, used = loop(victim, setting, device, generator)
        seconds += clock() - start
        found.append(errors(images, victim.images))
        evaluations.append(used)
        hits = sum(int((one < SUCCESS).sum()) for one in found)
        say(f"{name} plain: {number}/{len(victims)} victims, {hits} images recovered, {seconds:.0f} s")
    return row(name, "plain", found, evaluations, seconds)


def engine(setting: Setting) -> Inversion:
    """The engine as it is recommended for sigmoid LeNets, or at the settings of `published`."""
    if setting.model != "lenet":
        return GradientMatching(
            objective=Cosine(),
            priors=[TotalVariation(weight=1e-2)],
            optimizer=Adam(lr=0.1, signed=True, schedule="drops"),
            project=True,
            objective_scale=1.0,
            stopping=Stopping(setting.steps, 0.0, setting.steps, math.inf),
            restarts=1,
        )
    return MAP() if setting.likely else Peeling(fallback=GradientMatching(start="grey"))


def auxiliary(setting: Setting, images: Images, victims: Sequence[Victim], seed: int) -> tuple[Tensor, Tensor] | None:
    """Images and labels that the engine is granted, none of them a victim's; None where it is granted none."""
    if not setting.auxiliary:
        return None
    private = {image.numpy().tobytes() for victim in victims for image in victim.images}
    order = np.random.default_rng((seed, 1_000_003)).permutation(len(images))
    pairs = [images[int(index)] for index in order[: setting.auxiliary + len(private)]]
    others = [pair for pair in pairs if pair[0].numpy().tobytes() not in private][: setting.auxiliary]
    return torch.stack([image for image, _ in others]), torch.tensor([label for _, label in others])


def run_engine(
    name: str,
    setting: Setting,
    victims: Sequence[Victim],
    device: str,
    seed: int,
    granted: tuple[Tensor, Tensor] | None = None,
    own: bool = False,
) -> Row:
    """Time the engine on all victims in one call; our best in any case if it is `own`."""
    method = "fedleak" if own else "engine"
    knowledge = Knowledge(setting.network(), setting.shape, setting.classes, auxiliary=granted)
    observations = [victim.observation for victim in victims]

    def progress(state: Progress) -> None:
        say(
            f"{name} {method}: {state.done}/{state.problems} done, {state.converged} converged, "
            f"{state.evaluations_per_second:.0f} evaluations/s"
        )

    start = clock()
    guesses = [guess(observation) for observation in observations]
    inversion = Chooser() if own else engine(setting)
    results = inversion.invert(observations, guesses, knowledge, Run(device, seed, on_progress=progress))
    seconds = clock() - start
    found = [errors(result.images, victim.images) for result, victim in zip(results, victims, strict=True)]
    return row(name, method, found, [result.evaluations for result in results], seconds)


def say(line: str) -> None:
    """Progress, apart from the table."""
    print(line, file=sys.stderr, flush=True)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    head = (
        "setting",
        "method",
        "victims",
        "success",
        "evaluations",
        "seconds",
        "successes/s",
        "ratio",
        "rate",
        "ratio",
        "MSE",
    )
    lines = [head] + [
        (
            r.setting,
            r.method,
            str(r.victims),
            f"{r.success_rate:.1%}",
            f"{r.evaluations:.0f}",
            f"{r.seconds:.2f}",
            f"{r.successes_per_second:.3g}",
            f"{r.ratio:.1f}",
            f"{r.rate:.4g}",
            f"{r.rate_ratio:.1f}",
            f"{r.median_mse:.2g}",
        )
        for r in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def compared(fast: Row, slow: Row) -> Row:
    """The row with its ratios to plain's."""
    ratio = fast.successes_per_second / slow.successes_per_second if slow.success_rate else math.inf
    return replace(fast, ratio=ratio if fast.success_rate else 0.0, rate_ratio=fast.rate / slow.rate)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="The plain baseline against the engine, on the same victims.")
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist/, cifar10/ and cifar100/")
    parser.add_argument("--victims", type=int, default=32, help="updates to attack in each setting")
    parser.add_argument("--plain-victims", type=int, help="time the baseline on the first so many only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="may be repeated; default: all LeNets")
    parser.add_argument("--steps", type=int, default=2400, help="of Inverting Gradients' settings")
    parser.add_argument("--output", type=Path, help="the CSV to write")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the processor's seconds instead of the clock's: for a machine that does something else as well",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    if options.victims < 1 or (options.plain_victims is not None and not 1 <= options.plain_victims <= options.victims):
        parser.error("--victims must be at least 1, and --plain-victims from 1 to --victims")
    global clock
    clock = time.process_time if options.processor_time else time.perf_counter
    count = options.plain_victims or options.victims
    on = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "CPU"
    print(f"torch {torch.__version__}, {options.device} ({on}), {torch.get_num_threads()} threads, seed {options.seed}")
    if count < options.victims:
        print(f"plain: timed on the first {count} of {options.victims} victims")
    nn.Linear(8, 8).to(options.device)(torch.zeros(8, 8, device=options.device))  # start the device outside the timing
    rows: list[Row] = []
    for name in options.setting or LENETS:
        setting = replace(SETTINGS[name], steps=options.steps)
        images = Images(options.data / setting.data, setting.data)
        victims = make_victims(setting, images, options.victims, options.seed, options.device)
        granted = auxiliary(setting, images, victims, options.seed)
        quick = [run_engine(name, setting, victims, options.device, options.seed, granted)]
        if name == "cnn":
            quick.append(run_engine(name, setting, victims, options.device, options.seed, own=True))
        slow = run_plain(name, setting, victims[:count], options.device, options.seed)
        rows += [slow, *(compared(fast, slow) for fast in quick)]
        if options.output:
            with options.output.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(asdict(rows[0])))
                writer.writeheader()
                writer.writerows(asdict(r) for r in rows)
    print(table(rows))


if __name__ == "__main__":
    main()
