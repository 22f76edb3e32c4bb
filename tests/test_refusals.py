"""Impossible configurations: exit 2, one line, and nothing left behind."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fedleak
from fedleak.cli import main
from fedleak.jobs import _own_folder, _speak_again
from fedleak.models import LeNet
from fedleak.models.frozen import frozen_as_buffers

PARTS = """
class Sullen:
    def __init__(self):
        raise KeyError("no\\nway")


class Idle:
    pass


def odd(labels, clients, generator):
    return [1] * clients


def splits():
    return odd
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "sullen_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


GROUPS = ("data", "partition", "model", "defense", "adversary", "engine", "tracking", "strategy", "attack.labels")


@pytest.mark.parametrize(
    "override",
    [
        *(f"{group}._target_=sullen_parts.Sullen" for group in GROUPS),
        *(f"{group}._target_=sullen_parts.Idle" for group in GROUPS),
        *(f"{group.replace('.', '/')}=null" for group in GROUPS),
        "partition={_target_: sullen_parts.splits}",
        "+unknown=1",
        "+attack.unknown=1",
        "+federation.unknown=1",
        "+capture.unknown=1",
        "seed=99999999999999999999",
        "attack.name=..",
        "attack.name=.",
        "data.image_size=100000",
        "capture.clients=-1",
        "capture.rounds=[0]",
        "capture.dtype=int8",
        "capture=none",
        "engine=ray engine.num_cpus=4096",
        "engine=ray engine.num_gpus=64",
        "engine=ray engine.num_cpus=-1",
        "output_dir=a_file",
        "output_dir=a_file/inside",
        "output_dir=/proc/inside",
        "federation.rounds=1000000 federation.clients=1000 model=resnet18 data.image_size=32",
    ],
)
def test_it_is_refused_in_one_line_and_leaves_nothing(mine, capsys, override):
    (mine / "a_file").write_text("")
    before = sorted(mine.rglob("*"))
    assert main(["run", *([override] if "{" in override else override.split(" "))]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert [path for path in sorted(mine.rglob("*")) if "__pycache__" not in str(path)] == before


def test_two_runs_of_one_second_have_a_folder_each(tmp_path):
    folders = [_own_folder(tmp_path / "out" / "12-00-00")[0] for _ in range(3)]
    assert [Path(folder.split("=")[1]).name for folder in folders] == ["12-00-00", "12-00-00-2", "12-00-00-3"]


def test_hydra_does_not_silence_what_is_said_of_failed_clients():
    logger = logging.getLogger("fedleak")
    logger.disabled = True
    _speak_again()
    assert not logger.disabled


def test_frozen_parameters_are_not_trained_and_not_matched(tmp_path, monkeypatch):
    (tmp_path / "frozen_net.py").write_text(
        "from fedleak.models import LeNet\n\n\n"
        "def net(image_shape, classes):\n    model = LeNet(image_shape, classes)\n"
        "    for value in list(model.parameters())[:2]:\n        value.requires_grad_(False)\n    return model\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = ["run", "model._target_=frozen_net.net", "~model.init", "federation.clients=1", "federation.rounds=1"]
    run = [*run, "federation.batch_size=1", "attack=idlg", "attack.restarts=1", "attack.max_evaluations=5", "limit=off"]
    assert main([*run, f"output_dir={tmp_path / 'run'}"]) == 0
    [o] = fedleak.CaptureStore.open(tmp_path / "run" / "captures").load()
    names = [name for name, _ in LeNet((1, 28, 28), 10).named_parameters()]
    assert list(o.update) == list(o.parameters) == names[2:]
    assert sorted(o.buffers) == sorted(names[:2])
    assert all(torch.equal(o.buffers[name], o.start_buffers[name]) for name in names[:2])


def test_a_frozen_layer_still_works():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    before = model(torch.ones(1, 2))
    assert torch.equal(frozen_as_buffers(model)(torch.ones(1, 2)), before)
    assert [name for name, _ in model.named_parameters()] == ["0.bias", "1.weight", "1.bias"]


HEAVY = ("torch", "flwr", "pandas", "numpy", "matplotlib", "scipy", "sklearn", "skimage", "ray", "rich", "jinja2")


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["--help"], ()),
        (["run", "federation.client=2"], ()),
        (["run", "federation.clients=0"], ()),
        (["run", "attack=foo"], ()),
        (["attack", "run_dir=/no/such/folder"], ()),
        (["run", "defense=gaussian", "defense.std=-1"], ("torch", "flwr", "numpy", "rich")),
    ],
)
def test_a_refusal_imports_no_more_than_it_needs(words, needed):
    code = (
        f"import sys\nfrom fedleak.cli import main\nmain({words!r})\n"
        f"print(sorted(({set(HEAVY)!r} & sys.modules.keys()) - {set(needed)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_a_refused_typo_is_quick():
    import time

    words = [sys.executable, "-m", "fedleak.cli", "run", "federation.client=2"]
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        assert subprocess.run(words, capture_output=True, check=False, timeout=60).returncode == 2
        seconds.append(time.perf_counter() - began)
    print(f"a refused typo takes {min(seconds):.2f} s")
    assert min(seconds) < 1


@pytest.mark.slow
def test_the_smallest_run_starts_and_ends_in_four_seconds(tmp_path):
    import resource

    words = [sys.executable, "-m", "fedleak.cli", "run", "federation.clients=1", "federation.rounds=1", "attack=idlg"]
    words += ["federation.batch_size=1", "attack.max_evaluations=5"]
    seconds = []
    for number in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*words, f"output_dir={tmp_path / str(number)}"], capture_output=True, check=True, timeout=120)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime)
    print(f"the smallest run takes {min(seconds):.2f} s of CPU and {after.ru_maxrss // 1024} MB")
    assert min(seconds) < 6  # of CPU, where others may be at work too; the goal is 4 on a machine of one's own


HEADLESS = """
from torch import nn


def net(image_shape, classes, seed=0):
    return nn.Sequential(nn.Conv2d(image_shape[0], classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""
HEADLESS_NET = "model={_target_: headless_net.net}"
PEELING = ["attack=map", "attack/inversion=peeling", "attack.inversion.fallback=null"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attack=labels_only", HEADLESS_NET], "has no nn.Linear layer"),
        (["attack=idlg", "federation.batch_size=1", HEADLESS_NET], "has no nn.Linear layer"),
        (["attack=fedleak", HEADLESS_NET], "has no nn.Linear layer"),
        (["attack=map", "attack/labels=joint"], "attack=map (MAP) needs labels"),
        (["attack=learned", "federation.batch_size=2"], "reads single samples"),
        (
            ["attack=idlg", "federation.batch_size=1", "attack/inversion=features", "model=resnet20"],
            "chain of convolutions",
        ),
        ([*PEELING, "model=resnet20"], "cannot undo"),
        (
            [*PEELING, "federation.batch_size=6"],
            "cannot",
        ),
    ],
)
def test_an_attack_that_the_model_cannot_feed_is_refused_before_the_federation(mine, capsys, overrides, message):
    (mine / "headless_net.py").write_text(HEADLESS)
    assert main(["run", "data.image_size=16", "threat.labels=true", *overrides, "output_dir=run"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (mine / "run").exists()
