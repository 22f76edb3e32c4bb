"""A run directory from someone else is data: what its files name is neither imported nor called."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from fedleak.capture import CaptureStore
from fedleak.cli import main
from fedleak.errors import UsageError, printable
from fedleak.report.html import write_report
from fedleak.trust import is_own


@pytest.fixture
def stranger(small_run, tmp_path, monkeypatch) -> Path:
    """A copy of a run, and beside where the user stands a module that leaves a mark where it is imported."""
    shutil.copytree(small_run, tmp_path / "run")
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w').close()\nfrom fedleak.defenses import NoDefense\n"
    )
    (tmp_path / "evilpkg").mkdir()
    (tmp_path / "evilpkg" / "__init__.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    for name in ("evil", "evilpkg"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "run"


def store(run: Path, *overrides: str) -> None:
    path = run / ".hydra" / "overrides.yaml"
    path.write_text(path.read_text() + "".join(f"- {json.dumps(one)}\n" for one in overrides))


@pytest.mark.parametrize(
    "override",
    [
        "defense._target_=evil.NoDefense",
        "+attack.labels={_target_: os.system, command: touch mark}",
        "attack.inversion.objective._target_=evil.NoDefense",
        "+model.more.inside=[{_target_: evil.NoDefense}]",
        "data._target_=fedleak.cli.os.system",
        "data._target_=fedleak.cli.main",
        "data._target_=fedleak.attacks.base.torch.save",
        "data._target_=fedleak.attacks.torch.save",
        "hydra.searchpath=[pkg://evilpkg]",
        "hydra/job_logging=default",
        "+engine.init_args={address: ray://elsewhere}",
        "tracking.uri=sqlite:////tmp/elsewhere.db",
        "+attack.note=${oc.env:HOME}",
    ],
)
def test_what_a_stored_run_names_is_not_run(stranger, capsys, override):
    store(stranger, *(["tracking=mlflow"] if override.startswith("tracking") else []), override)
    assert main(["attack", f"run_dir={stranger}"]) == 2
    err = capsys.readouterr().err
    assert "--trust" in err
    assert err.count("\n") == 1
    assert not (stranger.parent / "mark").exists()


def test_a_folder_that_a_stored_run_searches_may_name_no_code_either(stranger, capsys):
    (stranger / "conf" / "defense").mkdir(parents=True)
    (stranger / "conf" / "defense" / "sneaky.yaml").write_text("{'_target_': evil.NoDefense}\n")
    store(stranger, f"hydra.searchpath=['file://{stranger}/conf']", "defense=sneaky")
    assert main(["attack", f"run_dir={stranger}"]) == 2
    assert "evil.NoDefense" in capsys.readouterr().err
    assert not (stranger.parent / "mark").exists()


@pytest.mark.parametrize("how", ["--trust", "again", "folder"])
def test_ones_own_parts_are_taken_when_they_are_trusted_or_named_again(stranger, tmp_path, how):
    (tmp_path / "conf" / "defense").mkdir(parents=True)
    (tmp_path / "conf" / "defense" / "mine.yaml").write_text("_target_: evil.NoDefense\n")
    override = "defense._target_=evil.NoDefense"
    if how == "folder":
        store(stranger, f"hydra.searchpath=['file://{tmp_path}/conf']", "defense=mine")
    else:
        store(stranger, override)
    words = {"--trust": ["--trust"], "again": [override], "folder": ["--config-dir", "conf"]}[how]
    assert main(["attack", f"run_dir={stranger}", "attack=labels_only", *words]) == 0
    assert (tmp_path / "mark").exists()


def test_parts_of_fedleak_are_free():
    for own in ("fedleak.defenses.Gaussian", "fedleak.data.IID", "fedleak.attacks.inversion.Cosine"):
        assert is_own(own), own
    for other in (
        "os.system",
        "fedleak.files.write_atomically",
        "fedleak.nowhere.X",
        "fedleak.data.files.unpickle",
    ):
        assert not is_own(other), other


def test_a_capture_has_no_optimiser_imported(stranger):
    store = CaptureStore.open(stranger / "captures")
    rows = [{**row, "optimizer": {"_target_": "evil.NoDefense", "lr": 0.1}} for row in store.rows()]
    with pytest.raises(UsageError, match="what a capture names is not imported"):
        store.load(rows)
    assert not (stranger.parent / "mark").exists()


def test_a_report_imports_nothing(stranger):
    config = stranger / ".hydra" / "config.yaml"
    config.write_text(config.read_text() + "extra: {_target_: evil.NoDefense}\n")
    write_report([stranger], stranger / "report.html")
    config.write_text("!!python/object/apply:os.system ['touch mark']\n")
    write_report([stranger], stranger / "report.html")
    assert not (stranger.parent / "mark").exists()


@pytest.mark.parametrize("name", ["../truth/round-00001-client-00000.safetensors", "/etc/hostname", "a/../../x", ""])
def test_paths_in_an_index_stay_inside_the_store(stranger, name):
    store = CaptureStore.open(stranger / "captures")
    for key in ("start_file", "update_file"):
        with pytest.raises(UsageError, match="is no file of this store"):
            store.load([{**row, key: name} for row in store.rows()])


def test_control_characters_are_shown_and_not_obeyed():
    assert printable("a\x1b[2J\x07b\u202e\nnext") == "a\\x1b[2J\\x07b\\u202e next"
    assert len(printable("x" * 10_000)) == 501
