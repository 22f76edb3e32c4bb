"""The malicious aggregator: wraps any Flower strategy and keeps what every client sends, every round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedleak.capture import CaptureInfo, CaptureStore, Observation, Payload, find_fault
from fedleak.federation.records import EXAMPLES, PARTITION, client_record, to_tensors
from fedleak.federation.rounds import is_due
from fedleak.federation.strategy import last_line
from fedleak.threat import ThreatModel


class Eavesdropper(Strategy):
    """An honest-but-curious server: the federation runs as before, and every update is captured.

    Wrapping the strategy of your own Flower app is one line::

        strategy = Eavesdropper(FedAvg(...), "captures", model=Net(), lr=0.1, batch_size=8)

    It changes nothing that the wrapped strategy sends, receives or computes, and must stay outermost so that it sees
    what the server sees. Attack the captures with `fedleak.attack`.

    Args:
        strategy: any Flower strategy (Message API).
        captures: folder for the captures; must not hold any yet.
        model: the shared model, whose parameters and buffers name the arrays; without it, every array counts as a
            parameter, in order.
        threat: what the attacker is granted; what is withheld is never written.
        payload: ``weights`` if clients return new weights (Flower's usual way), ``gradient`` if gradients.
        lr, local_steps, batch_size: what the server knows of its clients' training. A reply's or the configuration's
            own ``lr`` and ``local-steps`` go first; where no batch size is named, a reply's ``num-examples`` gives it.
        image_shape, classes: (C, H, W) and number of classes, for the attack.
        training_mode: whether clients train in train mode.
        per_sample: clients return each sample's gradient (iDLG's per-sample scenario).
        client_of: node id -> client number; by default what a reply's ``partition-id`` says, else the node's order.
        every: keep the updates of rounds 1, 1 + every, … only, which a long federation's disk may demand.
        on_round: called with a round's observations as soon as they are captured, for an attack inline.
    """

    def __init__(
        self,
        strategy: Strategy,
        captures: str | Path,
        *,
        model: nn.Module | None = None,
        threat: ThreatModel | None = None,
        payload: Payload = "weights",
        lr: float | None = None,
        local_steps: int | None = None,
        batch_size: int | None = None,
        image_shape: tuple[int, int, int] | None = None,
        classes: int | None = None,
        training_mode: bool = True,
        per_sample: bool = False,
        client_of: Callable[[int], int | None] | None = None,
        every: int = 1,
        on_round: Callable[[int, list[Observation]], None] | None = None,
    ) -> None:
        self.strategy = strategy
        self.threat = threat or ThreatModel()
        self.store = CaptureStore.create(Path(captures), CaptureInfo(self.threat, image_shape, classes, training_mode))
        self.payload: Payload = payload
        self.metadata = {"lr": lr, "local_steps": local_steps, "batch_size": batch_size}
        self.names = None if model is None else ([n for n, _ in model.named_parameters()], list(model.state_dict()))
        self.per_sample = per_sample
        self.client_of = client_of
        self.every = every
        self.on_round = on_round
        self._sent: dict[str, torch.Tensor] = {}
        self._config: Mapping[str, Any] = {}
        self._asked: list[int] = []
        self._order: dict[int, int] = {}

    def summary(self) -> None:
        """Log the wrapped strategy's summary."""
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapped strategy configure the round, and note what it sends to whom."""
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._sent = self._named(to_tensors(arrays))
        self._config = dict(config)
        self._asked = [message.metadata.dst_node_id for message in messages]
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Capture every reply, then let the wrapped strategy aggregate the same replies untouched."""
        replies = list(replies)
        if is_due(server_round, self.every):
            observations = sorted((self._observe(server_round, reply) for reply in replies), key=lambda o: o.client)
            for observation in observations:
                self.store.write(observation)
            if self.on_round is not None:
                self.on_round(server_round, observations)
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Pass on."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Pass on."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def _named(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Arrays by the model's own names: apps that send plain lists number theirs "0", "1", …"""
        if self.names is None or set(self.names[0]) <= set(tensors):
            return tensors
        for names in (self.names[1], self.names[0]):
            if len(names) == len(tensors):
                return dict(zip(names, tensors.values(), strict=True))
        return tensors

    def _split(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(parameters, buffers) of a model's arrays."""
        if self.names is None:
            return tensors, {}
        known = set(self.names[1])
        buffers = known - set(self.names[0])
        return (
            {name: value for name, value in tensors.items() if name not in buffers},
            {name: value for name, value in tensors.items() if name in buffers},
        )

    def _observe(self, server_round: int, reply: Message) -> Observation:
        parameters, start_buffers = self._split(self._sent)
        says = client_record(reply)
        client = self._client(reply, says)
        update: dict[str, torch.Tensor] = {}
        buffers: dict[str, torch.Tensor] = {}
        examples = None
        if reply.has_error():
            error: str | None = f"client error: {last_line(reply.error.reason)}"
        else:
            try:
                record = next(iter(reply.content.array_records.values()))
                update, buffers = self._split(self._named(to_tensors(record)))
                metrics: Mapping[str, Any] = next(iter(reply.content.metric_records.values()), MetricRecord())
                examples = metrics.get(EXAMPLES)
                fault = find_fault(update, parameters, per_sample=self.per_sample)
                error = None if fault is None else f"bad update: {fault}"
            except Exception as problem:  # a reply of any form must not stop the federation
                error = f"bad update: {type(problem).__name__}: {last_line(str(problem))}"
        local_steps = self._known("local-steps", "local_steps", says)
        batch_size = self.metadata["batch_size"]
        if isinstance(examples, int | float):
            batch_size = max(1, round(examples / (local_steps or 1))) if says or batch_size is None else batch_size
        labels = says.get("labels")
        return Observation(
            round=server_round,
            client=client,
            parameters=parameters,
            update=update if error is None else {},
            payload=self.payload,
            batch_size=int(batch_size) if batch_size is not None else None,
            lr=self._known("lr", "lr", says),
            local_steps=int(local_steps) if local_steps is not None else None,
            start_buffers=start_buffers,
            buffers=buffers if error is None else {},
            labels=torch.tensor(labels, dtype=torch.int64).sort().values if isinstance(labels, list) else None,
            per_sample=self.per_sample,
            error=error,
        )

    def _known(self, wire: str, name: str, says: Mapping[str, Any]) -> Any:
        return says.get(wire, self._config.get(wire, self.metadata[name]))

    def _client(self, reply: Message, says: Mapping[str, Any]) -> int:
        node = reply.metadata.src_node_id
        if self.client_of is not None and (client := self.client_of(node)) is not None:
            return client
        if PARTITION in says:
            return int(says[PARTITION])
        # A node keeps its number for the whole run; sorting makes the first numbers independent of arrival.
        for other in sorted(self._asked):
            self._order.setdefault(other, len(self._order))
        return self._order.setdefault(node, len(self._order))
