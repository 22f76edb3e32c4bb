"""The tap on apps of five forms that never heard of it: everything is on record, and nothing else changes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.numpy import load_file

import fedleak
from fedleak.audit.app import read_app, run_app
from fedleak.audit.tap import Recorder, Tap
from fedleak.federation.engine import LocalEngine, LocalGrid

APPS = Path(__file__).parents[1] / "apps"
WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "steps": np.array(3)}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def doubling_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_id == 2:
            raise ValueError("a node that fails")
        arrays = {name: Array(np.asarray(value.numpy() * 2)) for name, value in message.content["arrays"].items()}
        metrics = MetricRecord({"num-examples": 7, "loss": 0.5})
        content = {"arrays": ArrayRecord(arrays), "m": metrics, "c": ConfigRecord({"key": b"abc", "list": [b"", b"x"]})}
        return Message(RecordDict(content), reply_to=message)

    return app


def averaging_app(tapped, rounds=1) -> tuple[ServerApp, list]:
    app, final = ServerApp(), []

    @app.main()
    def main(grid, context):
        arrays = ArrayRecord({name: Array(value) for name, value in WEIGHTS.items()})
        result = FedAvg(fraction_evaluate=0.0).start(tapped(grid), arrays, num_rounds=rounds)
        final.append({name: array.numpy() for name, array in result.arrays.items()})

    return app, final


@pytest.mark.parametrize(
    ("form", "steps", "secret"),
    [
        ("quickstart", 2, False),
        ("advanced", 2, False),
        ("opacus_app", 2, False),
        ("secagg", 8, True),
        ("dp_sa", 8, True),
    ],
)
@pytest.mark.filterwarnings("ignore")  # opacus and the legacy interfaces have a lot to say
def test_an_app_of_each_form_is_on_record_without_a_change_to_it(form, steps, secret, tmp_path):
    if form == "opacus_app":
        pytest.importorskip("opacus")
    folder, watch = run_app(read_app(APPS / form), tmp_path, nodes=3)
    lines = [row for row in rows(folder) if row["type"] == "train"]
    sent, replies = ([row for row in lines if row["kind"] == kind] for kind in ("sent", "reply"))
    assert {row["kind"] for row in rows(folder)} == {"sent", "reply"}
    assert len(sent) == len(replies) == 3 * steps
    assert [row["error"] for row in replies] == [None] * len(replies)
    assert {row["id"] for row in sent} == {row["id"] for row in replies}
    assert {row["node"] for row in replies} == {"1", "2", "3"}
    shapes = [list(value.shape) for value in watch.require_model().state_dict().values()]
    carried = [row["content"] for row in replies if any(row["content"]["arrays"].values())]
    assert bool(carried) != secret, "under secure aggregation no arrays travel in the clear"
    for content in carried:
        tensors = load_file(folder / content["file"])
        assert [list(tensors[f"arrays/arrays/{n}"].shape) for n in content["arrays"]["arrays"]] == shapes
        assert content["metrics"]["metrics"]["num-examples"] in (16, 32)
    assert [session.steps for session in watch.sessions] == [1] * 6
    assert all(len(images) == len(labels) for images, labels in (session.truth for session in watch.sessions))


def test_the_federation_is_what_it_was_and_a_failing_node_is_on_record(tmp_path):
    plain, expected = averaging_app(lambda grid: grid, rounds=2)
    LocalEngine().run(plain, doubling_app(), 3)
    app, final = averaging_app(lambda grid: fedleak.tap(grid, tmp_path), rounds=2)
    LocalEngine().run(app, doubling_app(), 3)
    for name, value in expected[0].items():
        np.testing.assert_array_equal(final[0][name], value)
    [folder] = tmp_path.iterdir()
    replies = [row for row in rows(folder) if row["kind"] == "reply"]
    assert [row["error"]["reason"] for row in replies if row["error"]] == ["ValueError: a node that fails"] * 2
    content = next(row["content"] for row in replies if row["content"])
    assert content["metrics"] == {"m": {"num-examples": 7, "loss": 0.5}}
    assert content["configs"] == {"c": {"key": {"bytes": [3]}, "list": {"bytes": [0, 1]}}}
    tensors = load_file(folder / content["file"])
    assert tensors["configs/c/key/0"].tobytes() == b"abc"
    assert tensors["arrays/arrays/steps"] == 6
    assert tensors["arrays/arrays/steps"].shape == ()
    np.testing.assert_array_equal(tensors["arrays/arrays/a"], 2 * WEIGHTS["a"])
    models = {row["content"]["file"] for row in rows(folder) if row["kind"] == "sent"}
    assert len(models) == 2, "a model that goes to every node is kept once a round"


def test_each_run_has_a_folder_and_says_where(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        app, _ = averaging_app(lambda grid: fedleak.tap(grid))
        LocalEngine().run(app, doubling_app(), 2)
    folders = sorted((tmp_path / "captures").iterdir())
    assert len(folders) == 2
    assert sorted(capsys.readouterr().err.split()[3::4]) == [str(folder) for folder in folders]


def test_what_goes_wrong_in_recording_never_reaches_the_federation(tmp_path, capsys, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    app, final = averaging_app(lambda grid: fedleak.tap(grid, blocked))
    LocalEngine().run(app, doubling_app(), 2)
    assert final
    assert "nothing is captured: NotADirectoryError" in capsys.readouterr().err
    monkeypatch.setattr(Recorder, "keep", lambda *_: 1 / 0)
    app, final = averaging_app(lambda grid: fedleak.tap(grid, tmp_path / "ok"))
    LocalEngine().run(app, doubling_app(), 2)
    assert final
    [folder] = (tmp_path / "ok").iterdir()
    assert {row["kind"] for row in rows(folder)} == {"problem", "reply"}, "an error reply has no content to keep"
    monkeypatch.setattr(Recorder, "line", lambda *_: 1 / 0)
    app, final = averaging_app(lambda grid: fedleak.tap(grid, tmp_path / "worse"))
    LocalEngine().run(app, doubling_app(), 2)
    assert final


def test_an_app_without_a_main_is_tapped_by_the_line_below_it(tmp_path):
    def server_fn(context):
        initial = ndarrays_to_parameters([np.ones(3, dtype=np.float32)])
        strategy = LegacyFedAvg(fraction_evaluate=0.0, initial_parameters=initial)
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=1))

    class Client(NumPyClient):
        def fit(self, parameters, config):
            return [parameters[0] + 1], 5, {"secret": 3}

    app = fedleak.tap(ServerApp(server_fn=server_fn), tmp_path)
    assert isinstance(app, ServerApp)
    LocalEngine().run(app, ClientApp(client_fn=lambda context: Client().to_client()), 2)
    [folder] = tmp_path.iterdir()
    replies = [row for row in rows(folder) if row["kind"] == "reply"]
    assert [row["content"]["metrics"]["fitres.num_examples"] for row in replies] == [{"num_examples": 5}] * 2


def test_what_a_grid_has_of_its_own_stays_in_reach(tmp_path):
    grid = LocalGrid(doubling_app(), 3)
    grid.pull_interval = 0.25
    tapped = Tap(grid, tmp_path, quiet=True)
    assert tapped.pull_interval == 0.25
    assert list(tapped.get_node_ids()) == [1, 2, 3]
    assert [node.node_id for node in tapped.get_nodes()] == [1, 2, 3]
    assert tapped.run.run_id == 1
    tapped.set_run(None)
    content = RecordDict({"arrays": ArrayRecord({"a": Array(np.ones(2))})})
    message = tapped.create_message(content, "train", 1, "4")
    [reply] = tapped.pull_messages(tapped.push_messages([message]))
    assert reply.has_content()
    assert [(row["kind"], row["id"], row["node"]) for row in rows(tapped.folder)] == [
        ("sent", "1", "1"),
        ("reply", "1", "1"),
    ]
    with pytest.raises(AttributeError):
        tapped.nothing  # noqa: B018


def test_a_tap_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import fedleak; assert callable(fedleak.tap); import flwr"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=120)


class OwnStart(FedAvg):
    """A strategy with a loop, a method and a checkpoint of its own."""

    def __init__(self):
        super().__init__(fraction_evaluate=0.0)
        self.checkpoints = []

    def save(self, arrays):
        self.checkpoints.append(arrays)

    def start(self, grid, initial_arrays, twice):
        for _ in range(2):
            messages = self.configure_train(1, initial_arrays, ConfigRecord(), grid)
            initial_arrays, _ = self.aggregate_train(1, grid.send_and_receive(messages))
            self.save(initial_arrays)
        return twice


def test_an_eavesdropper_leaves_a_strategy_its_own_start_methods_and_checkpoints(tmp_path):
    app, seen = ServerApp(), []

    @app.main()
    def main(grid, context):
        strategy = fedleak.Eavesdropper(OwnStart(), tmp_path)
        arrays = ArrayRecord({"a": Array(WEIGHTS["a"])})
        seen.append(strategy.start(grid, arrays, twice="own result"))
        strategy.save(None)
        seen.append(strategy.checkpoints)
        with pytest.raises(AttributeError):
            strategy.nothing  # noqa: B018

    LocalEngine().run(app, doubling_app(), 3)
    assert seen[0] == "own result"
    assert len(seen[1]) == 3
    observations = fedleak.CaptureStore.open(tmp_path).load()
    assert len(observations) == 6
    assert torch.equal(observations[0].update["a"], torch.from_numpy(2 * WEIGHTS["a"]))


def test_a_second_run_of_an_eavesdropper_gets_a_folder_of_its_own(tmp_path, capsys):
    for _ in range(2):
        app = ServerApp()

        @app.main()
        def main(grid, context):
            arrays = ArrayRecord({"a": Array(WEIGHTS["a"])})
            fedleak.Eavesdropper(FedAvg(fraction_evaluate=0.0), tmp_path).start(grid, arrays, num_rounds=1)

        LocalEngine().run(app, doubling_app(), 2)
    assert [len(fedleak.CaptureStore.open(folder).load()) for folder in (tmp_path, tmp_path / "run-2")] == [2, 2]
    assert f"capturing in {tmp_path / 'run-2'}" in capsys.readouterr().err
