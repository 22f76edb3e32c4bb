"""The server: a legacy workflow with secure aggregation and differential privacy."""

from flwr.app import Context
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp

from dpsaapp.task import Net, get_weights

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_fit_clients=3,
        min_available_clients=3,
        initial_parameters=ndarrays_to_parameters(get_weights(Net())),
    )
    strategy = DifferentialPrivacyClientSideFixedClipping(
        strategy,
        noise_multiplier=config["noise-multiplier"],
        clipping_norm=config["clipping-norm"],
        num_sampled_clients=config["num-sampled-clients"],
    )
    legacy = LegacyContext(
        context=context, config=ServerConfig(num_rounds=config["num-server-rounds"]), strategy=strategy
    )
    workflow = DefaultWorkflow(
        fit_workflow=SecAggPlusWorkflow(
            num_shares=config["num-shares"], reconstruction_threshold=config["reconstruction-threshold"]
        )
    )
    workflow(grid, legacy)
