"""The honest client as a Flower ClientApp."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedleak.defenses.base import ClientView, Defense, leaving
from fedleak.errors import FedleakError
from fedleak.federation.records import ARRAYS, CLIENT, CONFIG, EXAMPLES, METRICS, PARTITION, to_arrays, to_tensors
from fedleak.federation.scenario import CLIPPING, Scenario, build_scenario
from fedleak.local_update import local_update
from fedleak.seeding import derive_seed, generator, global_draws
from fedleak.setup import Setup
from fedleak.threads import one_thread
from fedleak.truth import Truth, TruthStore

WITHHELD = "withheld"
"""Of a client's memory: what its defense took from earlier changes."""


def make_client_app(setup: Setup, truth: TruthStore) -> ClientApp:
    """The ClientApp of a federation.

    It closes over the setup only: each process builds the scenario once, so that Ray ships no images.

    Args:
        setup: the run's.
        truth: where the client keeps its private batches for the evaluation. It never travels to the server.
    """
    app = ClientApp()
    clipping = CLIPPING.get(setup.strategy.name)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        """Tell the server which partition this node holds."""
        return Message(RecordDict({CLIENT: ConfigRecord({PARTITION: _partition(context)})}), reply_to=message)

    @app.train(mods=[] if clipping is None else [clipping])
    def train(message: Message, context: Context) -> Message:
        """One round of local training, defended before anything leaves the client."""
        client = _partition(context)
        config = message.content.config_records[CONFIG]
        server_round, proximal = int(config["server-round"]), float(config.get("proximal-mu", 0.0))  # type: ignore[arg-type]
        scenario = build_scenario(setup)
        if scenario.drops_out(client, server_round):
            raise FedleakError("dropped out")
        scenario = replace(scenario, training=replace(scenario.training, proximal=proximal))
        received = to_tensors(message.content.array_records[ARRAYS])
        with one_thread():
            content = train_once(scenario, client, server_round, received, truth, memory=context.state)
        return Message(content, reply_to=message)

    return app


def train_once(
    scenario: Scenario,
    client: int,
    server_round: int,
    received: dict[str, Tensor],
    truth: TruthStore,
    *,
    memory: RecordDict | None = None,
) -> RecordDict:
    """The reply of one client in one round; `memory` is what it keeps for the next, for error feedback."""
    federation = scenario.federation
    images, labels = scenario.private_batch(client, server_round)
    if scenario.keep(server_round, client):
        truth.write(Truth(server_round, client, images, labels, federation.local_steps))
    names = [name for name, _ in scenario.model.named_parameters()]
    device = scenario.device
    start = {name: received[name].to(device) for name in names}
    random = generator(scenario.seed, "defense", client, server_round)
    training, model = scenario.training_in(server_round), scenario.model.to(device)
    buffers = {name: value.to(device) for name, value in received.items() if name not in start}
    images, labels = images.to(device), labels.to(device)
    defense = scenario.defense.seeing(ClientView(start, buffers, model, images, labels))
    with global_draws(derive_seed(scenario.seed, "layers", client, server_round)):  # dropout, bottlenecks
        result = local_update(
            model,
            start,
            buffers,
            *_trained_on(defense, scenario, images, labels, random),
            training,
            examples=partial(defense.examples, generator=random) if defense.per_example else None,
        )
    # A defense transforms the change that is sent: the gradient itself, or new minus old weights.
    update = {name: value.cpu() for name, value in result.update.items()}
    weights = training.payload == "weights"
    change = {name: value - received[name] for name, value in update.items()} if weights else update
    each = scenario.threat.per_sample_gradients
    if defense.feedback and memory is not None and not each:
        kept = memory.array_records.get(WITHHELD)
        change = change if kept is None else {n: v + to_tensors(kept)[n] for n, v in change.items()}
        defended = defend(defense, change, random, each=False)
        memory[WITHHELD] = to_arrays({name: value - defended[name] for name, value in change.items()})
    else:
        defended = defend(defense, change, random, each=each)
    if weights:
        # Adding the origin back would round what no defense touched.
        defended = {n: update[n] if torch.equal(v, change[n]) else received[n] + v for n, v in defended.items()}
    says = ConfigRecord({PARTITION: client, "lr": training.lr or 0.0, "local-steps": federation.local_steps})
    if scenario.threat.labels:
        says["labels"] = sorted(labels.tolist())
    return RecordDict(
        {
            ARRAYS: to_arrays({**defended, **result.buffers}),
            METRICS: MetricRecord({EXAMPLES: len(labels), "train_loss": result.loss}),
            CLIENT: says,
        }
    )


def _trained_on(
    defense: Defense, scenario: Scenario, images: Tensor, labels: Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What a defense makes of the private samples, local step by local step."""
    if type(defense).data is Defense.data:
        return images, labels
    steps = scenario.federation.local_steps
    parts = [
        defense.data(some, their, classes=scenario.data.classes, generator=random)
        for some, their in zip(images.chunk(steps), labels.chunk(steps), strict=True)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def defend(defense: Defense, change: dict[str, Tensor], random: torch.Generator, *, each: bool) -> dict[str, Tensor]:
    """The defended change; where every sample's gradient is shared, `each` sample's is defended on its own."""
    if not each:
        return leaving(defense, change, generator=random)
    samples = [dict(zip(change, values, strict=True)) for values in zip(*change.values(), strict=True)]
    defended = [leaving(defense, sample, generator=random) for sample in samples]
    return {name: torch.stack([sample[name] for sample in defended]) for name in defended[0]}


def _partition(context: Context) -> int:
    return int(context.node_config["partition-id"])
