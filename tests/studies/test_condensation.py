"""`fedleak condense`, and the federation's use of what it leaves."""

import json
import re

import pandas as pd
import pytest
import torch

from fedleak.cli import main
from fedleak.condensation import Trainer
from fedleak.data import condensed, digits
from fedleak.errors import UsageError
from fedleak.federation.scenario import build_scenario
from fedleak.setup import compose
from fedleak.studies import condensation
from fedleak.studies.condensation import nearest

SMALL = ["condense", "condense.networks=2", "condense.epochs=5", "condense.batch_size=8", "condense.evaluations=2"]
SMALL += ["model.width=8", "data.image_size=16", "model.depth=2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The run directory of a small condensation of the digits. Read only."""
    folder = tmp_path_factory.mktemp("condensed") / "run"
    assert main([*SMALL, f"output_dir={folder}"]) == 0
    return folder


def test_the_run_directory_holds_tables_images_and_picture(made):
    results = pd.read_csv(made / "results.csv")
    assert list(results.columns) == ["data", "images_per_class", "seed", "set", "network", "test_accuracy"]
    assert list(results["set"]) == ["condensed", "condensed", "random", "random"]
    summary = pd.read_csv(made / "summary.csv").set_index("set")
    assert summary.loc["random", "low"] <= summary.loc["random", "test_accuracy"] <= summary.loc["random", "high"]
    assert summary.loc["condensed", "nearest_private_mse"] > 0
    assert len(pd.read_csv(made / "nearest.csv")) == 10
    assert (made / "condensed.png").stat().st_size > 3_000
    assert json.loads((made / "study.json").read_text())["command"].startswith("fedleak condense")


def test_one_seed_gives_one_result_and_several_numbers_of_images_a_folder_each(made, tmp_path):
    two = ["condense.images_per_class=[1,2]", "condense.matches=2", "condense.train_epochs=2"]
    assert main([*SMALL, *two, f"output_dir={tmp_path / 'b'}"]) == 0
    assert main([*SMALL, f"output_dir={tmp_path / 'a'}"]) == 0
    pd.testing.assert_frame_equal(pd.read_csv(made / "results.csv"), pd.read_csv(tmp_path / "a" / "results.csv"))
    for count in (1, 2):
        found = condensed(root=str(tmp_path / "b" / f"{count}_per_class"))
        assert found.train_images.shape == (10 * count, 1, 16, 16)


def test_clients_train_on_the_condensed_images_and_are_judged_on_the_real_ones(made, tmp_path):
    found, original = condensed(root=str(made)), digits(image_size=16)
    assert found.train_labels.tolist() == list(range(10))
    assert torch.equal(found.test_images, original.test_images)
    small = [
        "attack=labels_only",
        "limit=off",
        "federation.clients=2",
        "federation.rounds=1",
        "federation.batch_size=1",
    ]
    assert main(["run", "data=condensed", f"data.root={made}", *small, f"output_dir={tmp_path / 'run'}"]) == 0
    assert pd.read_csv(tmp_path / "run" / "leakage.csv")["label_true"].between(0, 9).all()
    with pytest.raises(UsageError, match=r"data\.limit=3: condensed images are what they are"):
        condensed(root=str(made), limit=3)


def test_an_attacker_is_granted_the_condensed_images(made, tmp_path):
    chosen = ["threat.auxiliary_data=true", f"auxiliary={made}"]
    images, labels = build_scenario(compose([*chosen, "data.image_size=16"])).auxiliary_data()
    assert images.shape == (10, 1, 16, 16)
    assert labels.tolist() == list(range(10))
    for overrides, message in (
        (chosen, "condensed from other data than data=digits"),
        (chosen[1:], "grants no auxiliary data"),
        (["threat.auxiliary_data=true", f"auxiliary={tmp_path}"], "holds no condensed"),
    ):
        with pytest.raises(UsageError, match=message):
            build_scenario(compose(overrides))


def test_nearest_counts_as_many_others_as_private_ones():
    images = torch.rand(5, 1, 4, 4)
    rows = nearest(images[:1], torch.zeros(1, dtype=torch.long), images, images[1:3])
    assert rows[0]["nearest_private_mse"] == 0
    assert rows[0]["nearest_other_mse"] > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("condense.images_per_class=9999", "condense.images_per_class=9999: a class of data=digits has 126 images"),
        ("condense.images_per_class=[]", r"condense.images_per_class=\[\]: must be"),
        ("condense.matches=0", "condense.matches=0: must be null or a whole number"),
        ("condense.start=grey", "condense.start=grey: must be one of noise, real"),
        ("condense.network=3", "condense.network=3: unknown key; did you mean condense.networks"),
        ("condense.momentum=1", "condense.momentum=1: must be"),
    ],
)
def test_impossible_settings_are_refused(override, message, capsys):
    assert main(["condense", override]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("moment", ["network", "accuracy"])
def test_a_killed_condensation_goes_on_with_the_same_images(tmp_path, monkeypatch, moment):
    run = [*SMALL, "condense.networks=3", "condense.seeds=2"]
    assert main([*run, f"output_dir={tmp_path / 'whole'}"]) == 0
    monkeypatch.setattr(condensation, "SECONDS", 0.0)
    owner, name, last = {
        "network": (condensation, "save_progress", 5),  # of six networks
        "accuracy": (Trainer, "accuracy", 3),  # of eight
    }[moment]
    before, calls = getattr(owner, name), []

    def interrupted(*arguments, **options):
        calls.append(name)
        if len(calls) == last:
            raise KeyboardInterrupt
        return before(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        assert main([*run, f"output_dir={tmp_path / 'run'}"]) == 130
    done: list[int] = []
    monkeypatch.setattr(owner, name, lambda *a, **o: (done.append(1), before(*a, **o))[1])
    assert main(["run", f"resume={tmp_path / 'run'}"]) == 0
    assert len(done) == {"network": 2, "accuracy": 6}[moment]
    for file in ("results.csv", "nearest.csv", "summary.csv", "condensed.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not (tmp_path / "run" / "unfinished").exists()
