"""The study of networks as people train them: every cell and attack has its rows, and an interrupted one goes on."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from fedleak.cli import main
from fedleak.data import ImageData
from fedleak.errors import UsageError
from fedleak.studies.networks import Cell, Networks, draw_truth

ARGUMENTS = ["experiment=inverting_gradients", "data=digits", "quick=true"]
SMALL = "study.cells=[{network:convnet,steps:2},{network:convnet,batch_size:2,labels:equal}]"


def test_it_runs_on_the_digits_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = "['attack=inverting_gradients','attack/labels=known','threat.labels=true','attack.max_evaluations=4']"
    small = [SMALL, "study.networks.convnet=['model=cnn','model.norm=batch']"]
    small += [f"study.attacks.inverting_gradients={few}", f"study.attacks.fedleak={few}"]
    assert main(["run", *ARGUMENTS, *small, f"output_dir={out}"]) == 0
    before, summary = (pd.read_csv(out / name) for name in ("results.csv", "summary.csv"))
    assert summary["images"].tolist() == [1, 1, 2, 2]
    assert summary["accuracy"].notna().tolist() == [True, True, False, False]
    assert (before["psnr"] > 0).all()
    looks = pd.read_csv(out / "steps.csv")
    assert set(looks["attack"]) == {"inverting_gradients", "fedleak"}
    assert all((out / name).stat().st_size > 0 for name in ("networks.png", "evolution.png"))
    before.iloc[:-2].to_csv(out / "results.csv", index=False)  # as if it had been killed before its last attack
    assert main(["run", f"resume={out}"]) == 0
    after = pd.read_csv(out / "results.csv")
    columns = [name for name in before if name != "processor_seconds"]
    pd.testing.assert_frame_equal(after[columns], before[columns])


@pytest.mark.parametrize(("labels", "kinds"), [("equal", 1), ("different", 3)])
def test_batches_of_equal_and_different_labels(labels: str, kinds: int) -> None:
    images, classes = torch.zeros(30, 1, 4, 4, dtype=torch.uint8), torch.arange(30) % 5  # six of each
    data = ImageData("made up", images, classes, images, classes, list("abcde"))
    for seed in range(5):
        truth = draw_truth(data, Cell("any", batch_size=3, labels=labels), torch.Generator().manual_seed(seed))
        assert len(truth.labels.unique()) == kinds
    with pytest.raises(UsageError, match=r"7 (images of a class|classes)"):
        draw_truth(data, Cell("any", batch_size=7, labels=labels), torch.Generator())


def test_impossible_settings_are_refused() -> None:
    networks = {"networks": {"cnn": ["model=cnn"]}, "attacks": {"dlg": ["attack=dlg"]}}
    for cell in ({"network": "lenet"}, {"network": "cnn", "depth": 3}, {}):
        with pytest.raises(UsageError, match=r"study\.cells\[0\]=.*takes network"):
            Networks(cells=[cell], **networks)
    for key, value in (("steps", -1), ("batch_size", 0), ("labels", "some"), ("mode", "test"), ("victims", 0)):
        with pytest.raises(UsageError, match=rf"study\.cells\[0\]\.{key}={value}: must be"):
            Networks(cells=[{"network": "cnn", key: value}], **networks)
    with pytest.raises(UsageError, match=r"study\.only\.map"):
        Networks(cells=[{"network": "cnn"}], only={"map": ["cnn"]}, **networks)
