import shutil
import subprocess
import sys

import pandas as pd
import pytest

import fedleak
from fedleak.cli import main


def usage_error(capsys, arguments: list[str]) -> str:
    """The one line that a refused command leaves on stderr."""
    capsys.readouterr()
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def test_help_version_and_list(capsys):
    assert main(["--help"]) == 0
    assert "fedleak attack run_dir=DIR" in capsys.readouterr().out
    assert main(["run", "--help"]) == 0
    assert main([]) == 0
    capsys.readouterr()
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedleak {fedleak.__version__}\n"
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    for word in ("attack/labels", "version1", "dirichlet", "gaussian", "lenet", "image_folder", "ray"):
        assert word in listed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frob"], "frob: unknown command"),
        (["run", "--frob"], "--frob: unknown option"),
        (["run", "frob"], "frob: not an override; write key=value"),
        (["run", "attack=foo"], "attack=foo: no such choice"),
        (["run", "federation.clients=0"], "federation.clients=0: must be"),
        (["run", "federation.client=2"], "did you mean federation.clients?"),
        (["run", "data=mnist", "data.root=/no/such/folder"], "data.root=/no/such/folder does not exist"),
        (["run", "federation.clients=100000"], "federation.clients=100000 is more than the"),
        (["run", "attack/labels=known"], "grant it with threat.labels=true"),
        (["run", "attack=idlg", "federation.batch_size=2"], "reads 1 sample an update, not 2; choose federation.batch"),
        (["run", "federation=fedavg", "attack=version1", "threat.hyperparameters=false"], "needs the learning rate"),
        (["run", "--multirun", "federation.lr=0.1,abc"], "federation.lr=abc: must be"),
        (["run", "--config-dir", "/no/such/folder"], "--config-dir=/no/such/folder: no such folder"),
        (["attack"], "run_dir: missing"),
        (["attack", "run_dir=/no/such/folder"], "run_dir=/no/such/folder: no such folder"),
        (["attack", "run_dir=.", "data=mnist"], "data: fixed by the run"),
        (["list", "x"], "takes no arguments"),
        (["report"], "names no run directory"),
        (["report", "/no/such/folder"], "/no/such/folder"),
        (["report", ".", "--output"], "--output: names no file"),
        (["report", ".", "--frob"], "--frob: unknown option"),
    ],
)
def test_bad_input_is_one_clear_line(capsys, arguments, message):
    assert message in usage_error(capsys, arguments)


def test_cuda_without_a_gpu_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "device=cuda: no CUDA device" in usage_error(capsys, ["run", "device=cuda"])


def test_a_folder_without_captures_or_with_a_damaged_one_is_refused(capsys, small_run, tmp_path):
    assert "no captures there" in usage_error(capsys, ["attack", f"run_dir={tmp_path}"])
    damaged = tmp_path / "damaged"
    shutil.copytree(small_run, damaged)
    path = damaged / "captures" / "round-00001.shard"
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated or altered" in usage_error(capsys, ["attack", f"run_dir={damaged}"])
    (damaged / ".hydra" / "overrides.yaml").unlink()
    assert "overrides.yaml: missing or damaged" in usage_error(capsys, ["attack", f"run_dir={damaged}"])


def test_nothing_that_was_written_before_is_lost(capsys, small_run):
    before = {p: p.stat().st_mtime_ns for p in small_run.rglob("*")}
    assert "holds the results of an earlier run" in usage_error(capsys, ["run", f"output_dir={small_run}"])
    assert {p: p.stat().st_mtime_ns for p in small_run.rglob("*")} == before


def test_a_refused_run_leaves_no_folder(capsys, tmp_path):
    usage_error(capsys, ["run", "federation.clients=100000", f"output_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_one_page_on_one_run_or_on_several(capsys, small_run, tmp_path):
    assert (small_run / "report.html").stat().st_size > 100_000
    assert main(["report", str(small_run), str(small_run), "--output", str(tmp_path / "both.html")]) == 0
    assert (tmp_path / "both.html").exists()
    assert "both.html" in capsys.readouterr().out


def test_a_sweep_runs_every_combination(tmp_path):
    sweep = ["run", "-m", "defense=pruning", "defense.ratio=0.1,0.5", f"output_dir={tmp_path / 'sweep'}"]
    cheap = ["attack=labels_only", "attack/labels=llg", "limit=off"]
    assert main([*sweep, *cheap, "federation.rounds=1", "federation.clients=1"]) == 0
    defenses = [pd.read_csv(tmp_path / "sweep" / job / "attacks.csv").defense[0] for job in ("0", "1")]
    assert defenses == ["pruning(ratio=0.1)", "pruning(ratio=0.5)"]


def test_a_users_own_defense_is_one_file_and_one_yaml_line(tmp_path, monkeypatch):
    (tmp_path / "my_defense.py").write_text(
        "from fedleak.defenses import Defense\n\n\n"
        "class Silence(Defense):\n"
        "    def __init__(self, level):\n        self.level = level\n\n"
        "    def apply(self, update, *, generator):\n"
        "        return {name: value * 0 + self.level for name, value in update.items()}\n"
    )
    (tmp_path / "conf" / "defense").mkdir(parents=True)
    (tmp_path / "conf" / "defense" / "silence.yaml").write_text("_target_: my_defense.Silence\nlevel: 0.5\n")
    monkeypatch.chdir(tmp_path)
    run = [sys.executable, "-m", "fedleak.cli", "run", "--config-dir", "conf", "defense=silence", "output_dir=out"]
    done = subprocess.run(
        [*run, "attack=none", "federation.rounds=1"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    from fedleak.capture import CaptureStore

    update = CaptureStore.open(tmp_path / "out" / "captures").load()[0].update
    assert all((value == 0.5).all() for value in update.values())
