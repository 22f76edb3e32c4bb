"""The client: that of a simulation, on the partition that its SuperNode names."""

import shlex
from functools import cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedleak.federation.client import make_client_app
from fedleak.setup import compose

app = ClientApp()


@cache
def inner(overrides: str, truth: str) -> ClientApp:
    return make_client_app(compose(shlex.split(overrides)), Path(truth))


def answer(message: Message, context: Context) -> Message:
    config = context.run_config
    truth = str(config["truth-dir"]) or f"{config['output-dir']}/truth"
    return inner(str(config["overrides"]), truth)(message, context)


app.train()(answer)
app.query()(answer)
