"""Real SuperLink and SuperNode processes on loopback, with TLS and node authentication."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from fedleak.cli import main

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"

pytestmark = pytest.mark.skipif(not DOCKER.is_dir(), reason="docker/ is not in this distribution")

OVERRIDES = [
    "federation.clients=2",
    "federation.rounds=1",
    "federation.batch_size=1",
    "attack=idlg",
    "attack.restarts=1",
    "attack.max_evaluations=60",
    "limit=off",
    "seed=3",
]


@pytest.fixture(scope="module")
def loopback():
    """`docker/loopback.py` as a module."""
    spec = importlib.util.spec_from_file_location("loopback", DOCKER / "loopback.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_keys_are_made_and_kept_from_others(loopback, tmp_path):
    assert loopback.main(["--keys", str(tmp_path), "--nodes", "2"]) == 0
    made = {path.name: path for path in tmp_path.iterdir()}
    assert set(made) == {"ca.pem", "server.pem", "server.key", "node-0", "node-0.pub", "node-1", "node-1.pub"}
    for secret in ("server.key", "node-0", "node-1"):
        assert made[secret].stat().st_mode & 0o077 == 0
    assert made["node-0.pub"].read_text() != made["node-1.pub"].read_text()


def test_the_containers_use_flags_that_flower_has():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert set(services) == {"superlink", "supernode-0", "supernode-1"}
    for program in ("flower-superlink", "flower-supernode"):
        binary = Path(sys.executable).parent / program
        said = subprocess.run([binary, "--help"], capture_output=True, text=True, timeout=120, check=True).stdout
        for service in services.values():
            if service["entrypoint"] == [program]:
                assert [flag for flag in service["command"] if flag.partition("=")[0] not in said] == []


@pytest.mark.slow
def test_a_tapped_app_on_a_real_deployment_is_audited(loopback, tmp_path, monkeypatch):
    app = tmp_path / "app"
    subprocess.run(["cp", "-r", str(ROOT / "tests" / "apps" / "quickstart"), str(app)], check=True)
    server = app / "quickapp" / "server_app.py"
    line = f"    import fedleak\n    grid = fedleak.tap(grid, {str(tmp_path / 'captures')!r})\n"
    text = server.read_text()
    head = "def main(grid: Grid, context: Context) -> None:\n"
    server.write_text(text.replace(head, head + line))
    config = "num-server-rounds=1 fraction-evaluate=0.0"
    assert loopback.deploy(app, 2, config, _made(tmp_path / "work")) == 0
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "apps" / "quickstart"))
    client = "optimizer=sgd,lr=0.1,batch_size=32,epochs=1"
    command = ["audit", str(tmp_path / "captures"), "--model", "quickapp.task:Net", "--normalize", "0.5/0.5"]
    assert main([*command, "--client", client, "--seconds", "0", "--output", str(tmp_path / "audit")]) == 3
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert [u["verdict"] for u in found["updates"]] == ["exposed"] * 2
    assert all(len(u["node"]) > 5 for u in found["updates"]), "real node ids"


@pytest.mark.slow
def test_a_deployment_gives_the_tables_of_the_simulation(loopback, tmp_path):
    assert main(["run", *OVERRIDES, f"output_dir={tmp_path / 'simulated'}"]) == 0
    config = f'overrides="{" ".join(OVERRIDES)}" output-dir="{tmp_path / "deployed"}"'
    assert loopback.deploy(DOCKER / "federation", 2, config, _made(tmp_path / "work")) == 0
    for name in ("rounds.csv", "attacks.csv", "leakage.csv"):
        here, there = (pd.read_csv(tmp_path / kind / name) for kind in ("simulated", "deployed"))
        timed = [column for column in here.columns if "seconds" in column]
        pd.testing.assert_frame_equal(here.drop(columns=timed), there.drop(columns=timed), rtol=1e-4, atol=1e-6)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
