"""The server: trains, eavesdrops, attacks and judges, as in a simulation."""

import shlex
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedleak import pipeline
from fedleak.console import Console
from fedleak.errors import UsageError
from fedleak.federation.engine import GivenGrid
from fedleak.setup import compose

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    overrides = shlex.split(str(context.run_config["overrides"]))
    folder = Path(str(context.run_config["output-dir"]))
    if not folder.is_absolute():
        raise UsageError(f"output-dir={folder}: name an absolute folder; the server runs in one of its own")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["flwr", "run", *overrides]
    pipeline.run(compose(overrides), folder, Console(), command, engine=GivenGrid(grid, context))
