"""The client: DP-SGD by opacus."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from opacus import PrivacyEngine

from dpapp.task import Net, load_data, train

app = ClientApp()


@app.train()
def train_private(msg: Message, context: Context) -> Message:
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    loader = load_data(context.node_config["partition-id"])
    optimizer = torch.optim.SGD(model.parameters(), lr=context.run_config["learning-rate"])
    engine = PrivacyEngine(secure_mode=False)
    private, optimizer, private_loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=context.run_config["noise-multiplier"],
        max_grad_norm=context.run_config["max-grad-norm"],
        poisson_sampling=False,
    )
    epsilon = train(private, private_loader, engine, optimizer, torch.device("cpu"))
    metrics = MetricRecord({"epsilon": epsilon, "num-examples": len(loader.dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=msg)
