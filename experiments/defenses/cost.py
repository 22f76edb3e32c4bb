"""What each defense adds to a client's step, in CPU time: python experiments/defenses/cost.py [BATCH_SIZE] [REPEATS].

A step is the gradient of one batch (digits at 28×28, sigmoid LeNet) and, with a defense, all that it does before the
gradient leaves. Defended and undefended steps take turns; medians, and the quartiles of their ratio.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from fedleak.data import digits
from fedleak.defenses import Defense
from fedleak.defenses.base import ClientView, leaving
from fedleak.local_update import local_update
from fedleak.models import LeNet
from fedleak.setup import compose
from fedleak.training import LocalTraining

DEFENSES = (
    "gaussian", "laplacian", "pruning", "pruning_global", "clipping", "fp16", "bf16", "int8", "stochastic", "sign",
    "masking", "svd", "soteria", "outpost", "localdp", "mixup", "dpsgd",
)  # fmt: skip


def step(defense: Defense | None, view: ClientView, training: LocalTraining, generator: torch.Generator) -> float:
    """CPU seconds of one step."""
    began = time.process_time()
    images, labels, examples = view.images, view.labels, None
    if defense is not None:
        defense = defense.seeing(view)
        images, labels = defense.data(images, labels, classes=10, generator=generator)
        examples = partial(defense.examples, generator=generator) if defense.per_example else None
    made = local_update(view.model, view.parameters, {}, images, labels, training, examples=examples)
    if defense is not None:
        leaving(defense, made.update, generator=generator)
    return time.process_time() - began


def main(batch: int, repeats: int) -> pd.DataFrame:
    """A row a defense."""
    torch.set_num_threads(1)
    data = digits()
    model = LeNet()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    images, labels = data.train_images[:batch].float() / 255, data.train_labels[:batch]
    view = ClientView(parameters, {}, model, images, labels)
    training = LocalTraining(batch_size=batch, local_steps=1)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for name in DEFENSES:
        defense = compose([f"defense={name}", "attack=none"]).defense.build(Defense)
        for some in (None, defense):  # both warm
            step(some, view, training, generator)
        pairs = np.array([[step(some, view, training, generator) for some in (None, defense)] for _ in range(repeats)])
        plain, defended = np.median(pairs, axis=0)
        low, high = np.quantile(pairs[:, 1], [0.25, 0.75]) / plain - 1
        row = {"defense": name, "batch_size": batch, "step_ms": 1e3 * plain, "added": defended / plain - 1}
        rows.append(row | {"added_low": low, "added_high": high})
    return pd.DataFrame(rows).round(3)


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    table = main(*(numbers + [64, 15][len(numbers) :]))
    table.to_csv(Path(__file__).parent / "cost.csv", index=False)
    print(table.to_string(index=False))
