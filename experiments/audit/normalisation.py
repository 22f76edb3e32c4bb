"""Which normalisations a federation's updates tell apart, on real images: see the README beside this file.

    python experiments/audit/normalisation.py OUTPUT --images NAME=FOLDER …

Each FOLDER holds one folder of images a class, or MNIST as torchvision lays it out.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from study import Net
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import datasets, transforms

from fedleak.attacks.base import Knowledge
from fedleak.audit.normalisation import Normalization, look, told, usual, verdict
from fedleak.audit.preflight import preflight
from fedleak.audit.statement import Statement
from fedleak.audit.wire import Exchange
from fedleak.evaluation.intervals import wilson

CLIENTS, SAMPLES, LR = 3, 32, 0.1


class Grey(nn.Module):
    """The network of Flower's advanced PyTorch example, for one channel of 28 × 28."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 5), nn.Conv2d(16, 32, 5)
        self.fc1, self.fc2 = nn.Linear(512, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


def load(folder: Path, count: int = 1500) -> tuple[Tensor, Tensor]:
    """Images ``[N, C, H, W]`` in [0, 1] and labels below ten."""
    if (folder / "MNIST").is_dir():
        grey = datasets.MNIST(str(folder))
        return grey.data[:count, None].float() / 255, grey.targets[:count]
    found = datasets.ImageFolder(str(folder), transforms.Compose([transforms.Resize(32), transforms.ToTensor()]))
    chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:count].tolist()
    pairs = [found[i] for i in chosen]
    return torch.stack([x for x, _ in pairs]), torch.tensor([y % 10 for _, y in pairs])


def federation(images: Tensor, labels: Tensor, way: Normalization, seed: int, steps: int, warm: int, norm: bool):
    """A model and what `CLIENTS` clients answered to it."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 100)
    model = Grey() if images.shape[1] == 1 else Net(norm)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in way)

    def train(optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            chosen = torch.randint(len(images), (SAMPLES,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model((images[chosen] - mean) / std), labels[chosen]).backward()
            optimizer.step()

    train(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), warm)
    sent = {n: v.clone() for n, v in model.state_dict().items()}
    exchanges = []
    for client in range(CLIENTS):
        model.load_state_dict(sent)
        train(torch.optim.SGD(model.parameters(), lr=LR), steps)
        reply = {n: v.clone() for n, v in model.state_dict().items()}
        said = {"metrics": {"num-examples": SAMPLES * steps}}
        exchanges.append(Exchange(1, str(client), client, sent, reply, {}, said))
    return model, exchanges


def rows(name: str, images: Tensor, labels: Tensor, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """(images, true, stated, verdict) of every pair of usual normalisations, and of none stated."""
    shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    for true in usual(shape[0]):
        for seed in range(options.first, options.first + options.seeds):
            made = federation(images, labels, true, seed, options.steps, options.warm, options.norm)
            model, exchanges = made
            knowledge = Knowledge(model, shape, 10)
            stated = Statement(optimizer="sgd", lr=LR, batch_size=SAMPLES, epochs=1, source="stated")
            checked = preflight(exchanges, knowledge, [stated] * CLIENTS)
            found = look(checked, model, knowledge, None, seed=0)
            assert found is not None
            behind = dict(zip(map(told, usual(shape[0])), found.behind, strict=True))
            yield name, told(true), "–", told(found.best)
            for way in usual(shape[0]):
                ways = usual(shape[0], way)  # what is stated, and all that are not nearly the same
                gaps = [behind[told(other)] for other in ways]
                gaps = [gap - min(gaps) for gap in gaps]
                yield name, told(true), told(way), verdict(ways, gaps, ways[gaps.index(0.0)], way).verdict


def main() -> None:
    """Run all; write `normalisation.csv`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--images", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--warm", type=int, default=0)
    parser.add_argument("--norm", action="store_true")
    options = parser.parse_args()
    found: list[tuple[str, ...]] = []
    options.output.mkdir(parents=True, exist_ok=True)
    for word in options.images:
        name, _, folder = word.partition("=")
        found += rows(name, *load(Path(folder)), options)
        with (options.output / "normalisation.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("images", "true", "stated", "federations", "verdicts", "flagged", "low", "high"))
            for key in dict.fromkeys(row[:3] for row in found):
                told_ = Counter(row[3] for row in found if row[:3] == key)
                total, flagged = sum(told_.values()), told_["contradicts"]
                low, high = wilson(flagged / total, total)
                words = ", ".join(f"{verdict} {count}" for verdict, count in told_.items())
                writer.writerow((*key, total, words, flagged, round(low, 3), round(high, 3)))


if __name__ == "__main__":
    main()
