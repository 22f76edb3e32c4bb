"""The client: its classification head stays with it from round to round."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from advapp.task import Net, load_data
from advapp.task import train as train_fn

app = ClientApp()
HEAD = "head"


@app.train()
def train(msg: Message, context: Context) -> Message:
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    if HEAD in context.state.array_records:
        model.fc2.load_state_dict(context.state.array_records[HEAD].to_torch_state_dict())
    trainloader = load_data(context.node_config["partition-id"], context.run_config["batch-size"])
    loss = train_fn(
        model, trainloader, context.run_config["local-epochs"], msg.content["config"]["lr"], torch.device("cpu")
    )
    context.state.array_records[HEAD] = ArrayRecord(model.fc2.state_dict())
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(trainloader.dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=msg)
