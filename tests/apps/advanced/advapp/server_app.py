"""The server: a strategy that has a start of its own, and keeps the best model."""

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from advapp.task import Net

app = ServerApp()


class CustomFedAvg(FedAvg):
    """Its own loop over rounds, with a learning rate that falls, and a checkpoint."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.checkpoints = []

    def save(self, arrays):
        self.checkpoints.append(arrays)

    def start(self, grid, initial_arrays, num_rounds=3, timeout=3600, train_config=None, **kwargs):
        arrays = initial_arrays
        for current in range(1, num_rounds + 1):
            replies = grid.send_and_receive(self.configure_train(current, arrays, train_config, grid), timeout=timeout)
            arrays, _ = self.aggregate_train(current, replies)
            self.save(arrays)
            train_config["lr"] *= 0.5
        return arrays


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    strategy = CustomFedAvg(fraction_evaluate=config["fraction-evaluate"])
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        train_config=ConfigRecord({"lr": config["learning-rate"]}),
        num_rounds=config["num-server-rounds"],
    )
