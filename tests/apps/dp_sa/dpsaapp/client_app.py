"""The client: a NumPyClient whose fit result is clipped, then masked by SecAgg+."""

from flwr.app import Context
from flwr.client import NumPyClient
from flwr.client.mod import fixedclipping_mod, secaggplus_mod
from flwr.clientapp import ClientApp

from dpsaapp.task import Net, get_weights, load_data, set_weights, train


class FlowerClient(NumPyClient):
    """Trains for one epoch."""

    def __init__(self, loader, lr):
        self.loader, self.lr = loader, lr

    def fit(self, parameters, config):
        net = Net()
        set_weights(net, parameters)
        loss = train(net, self.loader, 1, self.lr, "cpu")
        return get_weights(net), len(self.loader.dataset), {"train_loss": loss}


def client_fn(context: Context):
    loader = load_data(context.node_config["partition-id"])
    return FlowerClient(loader, context.run_config["learning-rate"]).to_client()


app = ClientApp(client_fn=client_fn, mods=[secaggplus_mod, fixedclipping_mod])
