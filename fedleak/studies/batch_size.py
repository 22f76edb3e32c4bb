"""The founding study's four figures: how far the images come at batch sizes 1, 4, 8 and 16."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedleak.evaluation.metrics import RECOVERED_MSE
from fedleak.studies.base import Job
from fedleak.studies.fresh import FreshNetworks

LEAST_MSE = 1e-10
"""Where the axis of errors begins; exact images are drawn there."""


class BatchSize(FreshNetworks):
    """Reconstruction error by batch size, split by whether all labels were right; see `FreshNetworks`."""

    def summarise(self, frame: pd.DataFrame) -> pd.DataFrame:
        """With the runs whose labels were all right, and those with a wrong one, each by themselves.

        `recovered_right` is the share of images recovered where all labels were right, `mse_right` the median error.
        """
        summary = super().summarise(frame)
        keys = ["data", "attack", "batch_size"]
        for name, right in (("right", True), ("wrong", False)):
            cells = frame[frame["labels_exact"] == right].groupby(keys)
            split = pd.DataFrame(
                {
                    f"networks_{name}": cells.size(),
                    f"recovered_{name}": cells["recovered"].mean(),
                    f"mse_{name}": cells["mse"].median(),
                }
            )
            summary = summary.merge(split.reset_index(), on=keys, how="left")
            summary[f"networks_{name}"] = summary[f"networks_{name}"].fillna(0).astype(int)
        return summary

    def draw(self, frame: pd.DataFrame, summary: pd.DataFrame, job: Job) -> None:
        """``errors.png``: every batch's mean error, best first, a panel a batch size, hollow where a label is wrong."""
        sizes = list(dict.fromkeys(frame["batch_size"]))
        columns = min(2, len(sizes))
        lines = math.ceil(len(sizes) / columns)
        figure = Figure(figsize=(5.4 * columns + 1.6, 3.6 * lines + 0.5), layout="constrained")
        panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for panel in panels.flat[len(sizes) :]:
            panel.set_axis_off()
        for panel, size in zip(panels.flat, sizes, strict=False):
            for number, attack in enumerate(self.attacks):
                runs = frame[(frame["batch_size"] == size) & (frame["attack"] == attack)].sort_values("mse")
                errors = runs["mse"].clip(lower=LEAST_MSE)
                share = (np.arange(len(runs)) + 0.5) / len(runs)
                panel.plot(share, errors, color=f"C{number}", linewidth=1, alpha=0.6)
                for right, face in ((True, f"C{number}"), (False, "white")):
                    these = (runs["labels_exact"] == right).to_numpy()
                    panel.plot(share[these], errors[these], "o", color=f"C{number}", markerfacecolor=face, markersize=4)
                panel.plot([], [], "o-", color=f"C{number}", label=attack.replace("_", " "))
            panel.axhline(RECOVERED_MSE, color="0.4", linewidth=0.8, linestyle=":")
            panel.set_xlim(0, 1)
            panel.set_yscale("log")
            panel.set_title(f"batch size {size}, {len(runs)} networks")
            panel.set_xlabel("share of networks, best first")
            panel.grid(alpha=0.25)
        panels[0, -1].plot([], [], "o", color="0.3", markerfacecolor="white", label="a label is wrong")
        panels[0, -1].plot([], [], ":", color="0.4", label="recovered below")
        panels[0, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
        for panel in panels[:, 0]:
            panel.set_ylabel("MSE, mean over the batch")
        figure.suptitle("Reconstruction error of each batch, images assigned to private ones")
        figure.savefig(job.folder / "errors.png", dpi=110)
