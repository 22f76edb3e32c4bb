"""Real SuperLink and SuperNode processes on loopback, with TLS and node authentication."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from fedleak.audit.wire import find_runs, read
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


BARE = """
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

import fedleak

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid, context):
    grid = fedleak.tap(grid, context.run_config["captures"])
    FedAvg(fraction_evaluate=0.0).start(grid, ArrayRecord([np.zeros(3, np.float32)]), num_rounds=2)


@client.train()
def train(msg, context):
    [start] = msg.content["arrays"].to_numpy_ndarrays()
    arrays = ArrayRecord([start + 1 + context.node_config["partition-id"]])
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 4})}), reply_to=msg)
"""


def test_two_nodes_with_keys_of_their_own_over_tls_are_on_record(loopback, tmp_path):
    app = _made(tmp_path / "app")
    (app / "bare.py").write_text(BARE)
    (app / "pyproject.toml").write_text(
        '[project]\nname = "bare"\nversion = "1.0.0"\nlicense = "Apache-2.0"\n[tool.flwr.app]\npublisher = "fedleak"\n'
        '[tool.flwr.app.components]\nserverapp = "bare:server"\nclientapp = "bare:client"\n'
        '[tool.flwr.app.config]\ncaptures = ""\n'
    )
    assert loopback.deploy(app, 2, f'captures="{tmp_path / "captures"}"', _made(tmp_path / "work")) == 0
    [run] = find_runs(tmp_path / "captures")
    exchanges = read(run)
    assert [(e.round, e.client, e.error) for e in exchanges] == [(1, 0, None), (1, 1, None), (2, 0, None), (2, 1, None)]
    assert len({e.node for e in exchanges}) == 2
    changes = [float(next(iter(e.reply.values()))[0] - next(iter(e.sent.values()))[0]) for e in exchanges]
    assert sorted(changes[:2]) == sorted(changes[2:]) == [1.0, 2.0]
    assert float(next(iter(exchanges[2].sent.values()))[0]) == 1.5, "the mean of both"


TAPPED = {
    "quickstart": ("quickapp", 2, "optimizer=sgd,lr=0.1,batch_size=32,epochs=1", 1.0),
    "advanced": ("advapp", 2, "batch_size=16,epochs=1", 1.0),
}
"""App -> its package, rounds, what its user says of its clients (messages tell the advanced one's learning rate)."""


@pytest.mark.slow
@pytest.mark.parametrize("form", TAPPED)
def test_a_tapped_app_on_a_real_deployment_is_audited(form, loopback, tmp_path, monkeypatch):
    package, rounds, client, accuracy = TAPPED[form]
    app = tmp_path / "app"
    shutil.copytree(ROOT / "tests" / "apps" / form, app)
    server, clients = (app / package / f"{kind}_app.py" for kind in ("server", "client"))
    tap = f"    grid = fedleak.tap(grid, {str(tmp_path / 'c')!r})\n"
    _insert(server, "def main(grid: Grid, context: Context) -> None:\n", tap)
    note = f"    fedleak.note_truth(msg, trainloader.dataset.tensors[1], folder={str(tmp_path / 'truth')!r})\n"
    _insert(clients, '    metrics = MetricRecord({"train_loss"', note, after=False)
    config = f"num-server-rounds={rounds} fraction-evaluate=0.0"
    assert loopback.deploy(app, 2, config, _made(tmp_path / "work")) == 0
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "apps" / form))
    command = ["audit", str(tmp_path / "c"), "--model", f"{package}.task:Net", "--normalize", "0.5/0.5"]
    options = ["--seconds", "0", "--truth", str(tmp_path / "truth"), "--output", str(tmp_path / "audit")]
    assert main([*command, "--client", client, *options]) == 3
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert [u["verdict"] for u in found["updates"]] == ["exposed"] * 2 * rounds
    assert [u["labels"]["accuracy"] for u in found["updates"]] == [accuracy] * 2 * rounds
    assert all(len(u["node"]) > 5 for u in found["updates"]), "real node ids"


def _insert(file: Path, place: str, line: str, *, after: bool = True) -> None:
    """One line more in an app, and the import that it needs."""
    text = file.read_text()
    assert text.count(place) == 1
    text = text.replace(place, place + line if after else line + place)
    file.write_text(text.replace("from flwr.app import", "import fedleak\nfrom flwr.app import", 1))


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
