"""DLG on one fully connected layer, 784-10: image and soft label optimised together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from fedleak.config import list_of
from fedleak.evaluation.intervals import of_median
from fedleak.evaluation.metrics import RECOVERED_MSE
from fedleak.studies.base import Job, require
from fedleak.studies.fresh import FreshNetworks

LEAST_MSE = 1e-16
"""Where exact images are drawn on an axis of errors."""


class MlpDlg(FreshNetworks):
    """Label accuracy, objective and error against evaluations; see `FreshNetworks`.

    A start depends on nothing but the seed and its network, so an attack with a smaller budget is the beginning of the
    one with a larger budget: every attack is run to each budget.

    Args:
        attacks: as there, without ``attack.max_evaluations``.
        controls: attacks that are run once, as they are.
        budgets: evaluations.
        settings: as there.
    """

    def __init__(
        self,
        attacks: Mapping[str, Sequence[str]],
        controls: Mapping[str, Sequence[str]],
        budgets: Sequence[int],
        **settings: Any,
    ) -> None:
        require("budgets", budgets, list_of(1))
        self.starts = {f"{name} {budget}": (name, budget) for name in attacks for budget in budgets}
        each = {
            key: [*attacks[name], f"attack.max_evaluations={budget}"] for key, (name, budget) in self.starts.items()
        }
        super().__init__({**each, **controls}, **settings)

    def draw(self, frame: pd.DataFrame, summary: pd.DataFrame, job: Job) -> None:
        """``evaluations.png``: median objective, median error and label accuracy against evaluations."""
        figure = Figure(figsize=(12.5, 3.9), layout="constrained")
        panels = figure.subplots(1, 3)
        for number, name in enumerate(dict.fromkeys(name for name, _ in self.starts.values())):
            keys = [key for key, (attack, _) in self.starts.items() if attack == name]
            budgets = [self.starts[key][1] for key in keys]
            for panel, column in zip(panels, ("objective", "mse"), strict=False):
                cells = [frame.loc[frame["attack"] == key, column] for key in keys]
                low, high = zip(*(of_median(cell) for cell in cells), strict=True)
                panel.fill_between(budgets, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
                panel.plot(
                    budgets, [cell.median() for cell in cells], "o-", color=f"C{number}", markersize=4, label=name
                )
            part = summary.set_index("attack").loc[keys]
            bounds = part["label_accuracy_low"], part["label_accuracy_high"]
            panels[2].fill_between(budgets, *bounds, color=f"C{number}", alpha=0.15, linewidth=0)
            panels[2].plot(budgets, part["label_accuracy"], "o-", color=f"C{number}", markersize=4, label=name)
        panels[1].axhline(RECOVERED_MSE, color="0.4", linewidth=0.8, linestyle=":", label="recovered below")
        for name in self.attacks.keys() - self.starts.keys():
            error = max(LEAST_MSE, frame.loc[frame["attack"] == name, "mse"].median())
            panels[1].axhline(error, color="0.2", linewidth=1, linestyle="--", label=name.replace("_", " "))
        titles = ("objective, median", "MSE, median", "label right")
        for panel, title in zip(panels, titles, strict=True):
            panel.set_xscale("log")
            panel.set_xlabel("evaluations")
            panel.set_title(title)
            panel.grid(alpha=0.25)
        for panel in panels[:2]:
            panel.set_yscale("log")
        panels[2].set_ylim(-0.02, 1.02)
        panels[1].legend(fontsize=8, frameon=False)
        figure.suptitle("One linear layer, 784 → 10: DLG and iDLG from U(0, 1), with 95% intervals")
        figure.savefig(job.folder / "evaluations.png", dpi=110)
