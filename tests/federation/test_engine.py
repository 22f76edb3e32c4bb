"""The local engine: a canary for the private parts of Flower it relies on, and errors as error replies."""

import signal
import subprocess
import sys
import time

import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedleak.federation.engine import LocalEngine, LocalGrid


def echo_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(message.content["config"]["number"])
        if number == 2:
            raise ValueError("two is too many")
        message.content["config"]["number"] = 100  # must not reach the other clients
        answer = ConfigRecord({"number": number, "partition-id": int(context.node_config["partition-id"])})
        return Message(RecordDict({"answer": answer}), reply_to=message)

    return app


def test_flowers_private_parts_are_still_where_the_local_grid_needs_them():
    grid = LocalGrid(echo_app(), 3)
    shared = RecordDict({"config": ConfigRecord({"number": 1})})
    messages = [Message(shared, dst_node_id=node, message_type=MessageType.TRAIN) for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(messages))
    assert [m.metadata.message_id for m in messages] == ["1", "2", "3"]
    assert [r.metadata.reply_to_message_id for r in replies] == ["1", "2", "3"]
    assert [r.metadata.src_node_id for r in replies] == [1, 2, 3]
    assert [r.content["answer"]["partition-id"] for r in replies] == [0, 1, 2]
    assert [r.content["answer"]["number"] for r in replies] == [1, 1, 1], "each client gets its own copy"


def test_an_exception_becomes_an_error_reply():
    grid = LocalGrid(echo_app(), 1)
    content = RecordDict({"config": ConfigRecord({"number": 2})})
    [reply] = grid.send_and_receive([Message(content, dst_node_id=1, message_type=MessageType.TRAIN)])
    assert reply.has_error()
    assert reply.error.reason == "ValueError: two is too many"


def test_the_server_app_runs_to_its_end():
    app, seen = ServerApp(), []

    @app.main()
    def main(grid, context):
        seen.extend(grid.get_node_ids())

    LocalEngine().run(app, echo_app(), 4)
    assert seen == [1, 2, 3, 4]


@pytest.mark.slow
def test_ctrl_c_ends_a_run_on_ray_and_leaves_no_process(tmp_path):
    import psutil

    words = ["run", "engine=ray", "federation.clients=2", "federation.rounds=5000", "attack=none", "limit=off"]
    process = subprocess.Popen([sys.executable, "-m", "fedleak.cli", *words, f"output_dir={tmp_path / 'run'}"])
    rounds = tmp_path / "run" / "rounds.csv"
    began = time.perf_counter()  # Ray's workers are nice: on a busy machine they may not get anywhere
    while time.perf_counter() - began < 120 and (not rounds.exists() or len(rounds.read_text().splitlines()) < 3):
        time.sleep(0.5)
        assert process.poll() is None
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    took = time.perf_counter() - began
    _, left = psutil.wait_procs(children, 10)
    print(f"Ctrl-C ended a run on Ray with {len(children)} processes in {took:.1f} s, {len(left)} are left")
    assert not left
