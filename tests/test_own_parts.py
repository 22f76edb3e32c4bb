"""A user's part from ``--config-dir`` works wherever a built-in one does."""

import json
import shlex
from pathlib import Path

import pandas as pd
import pytest

import fedleak
from fedleak.attacks import Attack, LabelsOnly
from fedleak.attacks.labels import Version1
from fedleak.cli import main
from fedleak.errors import UsageError
from fedleak.models import LeNet

FEDERATION = ["federation.clients=2", "federation.rounds=1", "federation.batch_size=2", "limit=off"]


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A folder of a user's own choices, with a name that needs quoting."""
    folder = tmp_path / "my conf (it's new, v2)"
    files = {
        "attack/labels/mine": "# the labels my way\n_target_: fedleak.attacks.labels.Version1\n",
        "data/few": "# few digits\n_target_: fedleak.data.digits\nimage_size: 28\nlimit: 100\nroot: null\n",
        "experiment/own": "# @package _global_\n# my study\nstudy:\n  _target_: fedleak.studies.IdlgTable1\n"
        "  attacks: {mine: [attack=labels_only, attack/labels=mine]}\n  datasets: [few]\n  networks: 2\n",
        "defense/quiet": "# hardly any noise\n_target_: fedleak.defenses.Gaussian\nstd: 1.0e-9\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_in_a_run_and_in_an_attack_on_it(conf, tmp_path, capsys):
    run = ["run", "--config-dir", str(conf), "attack=labels_only", "defense=quiet", *FEDERATION]
    assert main([*run, f"output_dir={tmp_path / 'run'}"]) == 0
    # The earlier run's own choices are found again, and today's beside them.
    assert main(["attack", f"run_dir={tmp_path / 'run'}", f"output_dir={tmp_path / 'again'}"]) == 0
    mine = ["attack/labels=mine", f"output_dir={tmp_path / 'mine'}"]
    assert main(["attack", f"run_dir={tmp_path / 'run'}", f"--config-dir={conf}", *mine]) == 0
    assert pd.read_csv(tmp_path / "mine" / "attacks.csv").defense[0] == "gaussian(std=1e-09)"
    capsys.readouterr()
    assert main(["run", "--config-dir", str(conf), "defense=quite"]) == 2
    assert "did you mean quiet?" in capsys.readouterr().err


def test_in_the_list(conf, capsys):
    assert main(["list", "--config-dir", str(conf)]) == 0
    assert "the labels my way" in capsys.readouterr().out


def test_among_the_methods_of_fedleak_labels(conf, tmp_path, capsys):
    small = ["labels.methods=[version1,mine]", "labels.runs=2", "labels.batch_sizes=[2]", "data=few"]
    assert main(["labels", "--config-dir", str(conf), *small, f"output_dir={tmp_path / 'out'}"]) == 0
    by_method = pd.read_csv(tmp_path / "out" / "labels.csv").groupby("method").label_accuracy.apply(list)
    assert by_method["mine"] == by_method["version1"]
    command = json.loads((tmp_path / "out" / "study.json").read_text())["command"]
    assert main([*shlex.split(command)[1:], f"output_dir={tmp_path / 'repeated'}"]) == 0
    assert main(["labels", "labels.methods=[mine]"]) == 2
    assert "labels.methods=mine: no such choice" in capsys.readouterr().err


def test_among_the_methods_and_the_federations_of_a_study(conf, tmp_path):
    study = ["experiment=rounds", "study.rounds=1", "study.every=1", "study.moments=[1]", "study.clients=1"]
    mine = ["study.methods=[random,mine]", "study.seeds=1", "defense=quiet", "data=few", "attack=version1"]
    short = ["attack.restarts=1", "attack.max_evaluations=2", *FEDERATION]
    out = tmp_path / "study"
    assert main(["run", "--config-dir", str(conf), *study, *mine, *short, f"output_dir={out}"]) == 0
    assert set(pd.read_csv(out / "labels.csv").method) == {"random", "mine"}
    assert main(["attack", f"run_dir={out / 'seed-0'}", "attack=labels_only", "attack/labels=mine"]) == 0


def test_among_the_data_and_the_attacks_of_a_study(conf, tmp_path):
    run = ["run", f"--config-dir={conf}", "experiment=own", f"output_dir={tmp_path / 'study'}"]
    assert main(run) == 0
    assert pd.read_csv(tmp_path / "study" / "results.csv").data.tolist() == ["few", "few"]


def test_an_attack_of_ones_own_from_python(small_run):
    attack = Attack(Version1(), LabelsOnly(), name="mine")
    captures, model = small_run / "captures", LeNet((1, 28, 28), 10)
    mine = fedleak.attack(captures, model, attack)
    named = fedleak.attack(captures, model, "labels_only", overrides=["attack/labels=version1"])
    assert [found.labels.tolist() for found in mine] == [found.labels.tolist() for found in named]
    with pytest.raises(UsageError, match="would change nothing of an attack that is made"):
        fedleak.attack(captures, model, attack, overrides=["attack.restarts=2"])
