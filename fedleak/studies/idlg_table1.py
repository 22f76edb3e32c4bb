"""iDLG's first table: label accuracy at batch size 1, of the joint optimisation and of the sign rule."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedleak.studies.base import Job
from fedleak.studies.fresh import FreshNetworks

PUBLISHED = {
    ("mnist", "dlg"): 0.899,
    ("cifar100", "dlg"): 0.833,
    ("lfw", "dlg"): 0.791,
    ("mnist", "idlg"): 1.0,
    ("cifar100", "idlg"): 1.0,
    ("lfw", "idlg"): 1.0,
}
"""(data set, attack) -> label accuracy over 1,000 networks (Zhao, Mopuri and Bilen, iDLG, 2020, table 1)."""


class IdlgTable1(FreshNetworks):
    """Label accuracy on fresh networks, a private image each; see `FreshNetworks` for the settings."""

    def summarise(self, frame: pd.DataFrame) -> pd.DataFrame:
        """With the published label accuracy beside ours."""
        summary = super().summarise(frame)
        # The sign rule's labels are iDLG's, with or without images.
        cells = zip(summary["data"], summary["attack"].str.removesuffix("_labels"), strict=True)
        summary.insert(4, "published", [PUBLISHED.get(key, np.nan) for key in cells])
        return summary

    def draw(self, frame: pd.DataFrame, summary: pd.DataFrame, job: Job) -> None:
        """``labels.png``: label accuracy of each attack, a panel a data set, the published figure marked.

        A bar takes the label at the lowest objective; a ring the one at the last step, as the published code does.
        """
        names = list(dict.fromkeys(summary["data"]))
        figure = Figure(figsize=(1.8 + 3.4 * len(names), 1.7 + 0.42 * len(self.attacks)), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(names), sharey=True))
        attacks = list(self.attacks)
        for panel, name in zip(panels, names, strict=True):
            part = summary[summary["data"] == name].set_index("attack")
            for place, attack in enumerate(attacks):
                if attack not in part.index:
                    continue
                row = part.loc[attack]
                accuracy = row["label_accuracy"]
                error = [[accuracy - row["label_accuracy_low"]], [row["label_accuracy_high"] - accuracy]]
                panel.barh(place, accuracy, height=0.62, color="#c2410c" if "idlg" in attack else "#1d4ed8", alpha=0.8)
                panel.errorbar(accuracy, place, xerr=np.maximum(error, 0), color="0.15", capsize=3, linewidth=1)
                said = f"{accuracy:.1%}  (n = {row['networks']})"
                panel.text(0.02, place, said, va="center", fontsize=8, color="white")
                panel.plot(row["last_label_accuracy"], place, "o", color="white", markeredgecolor="black", markersize=5)
                if np.isfinite(row["published"]):
                    panel.plot([row["published"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2.5)
            panel.set_title(name)
            panel.set_xlim(0, 1.05)
            panel.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100%"])
            panel.grid(axis="x", alpha=0.25)
        panels[0].set_yticks(range(len(attacks)), [attack.replace("_", " ") for attack in attacks])
        panels[0].invert_yaxis()
        keys = [
            Line2D([], [], color="0.15", marker="|", linewidth=1, label="95% interval"),
            Line2D([], [], color="black", marker="o", markerfacecolor="white", linewidth=0, label="at the last step"),
            Line2D([], [], color="black", linewidth=2.5, label="published"),
        ]
        figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        figure.suptitle("Labels inferred rightly at batch size 1")
        figure.savefig(job.folder / "labels.png", dpi=110)
