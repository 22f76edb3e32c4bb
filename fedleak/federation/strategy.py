"""FedAvg and FedSGD on Flower, made repeatable: clients are sampled and summed by partition id, not by node id."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from time import sleep

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedleak.capture import find_fault
from fedleak.errors import FedleakError, printable
from fedleak.federation.adversary import Adversary
from fedleak.federation.records import ARRAYS, CONFIG, PARTITION, client_record, to_arrays, to_tensors
from fedleak.seeding import generator

log = logging.getLogger("fedleak")


class RepeatableFedAvg(FedAvg):
    """FedAvg whose result depends on the seed alone, and that survives clients which fail.

    Node ids are random in every run and replies arrive in any order, so the strategy first asks every node for its
    partition id (a QUERY message), then samples and sorts by that. Replies that carry an error, a wrong shape or a
    value that is not finite are left out of the average; if none is left the round raises.

    Args:
        clients: how many nodes the federation has; training starts when all of them are connected.
        fraction: share of the clients sampled each round, at least one.
        seed: decides the sampling.
        buffers: names of the arrays that are buffers, not parameters.
        per_sample: updates have a leading sample dimension, averaged here.
        adversary: alters what is sent to each client; None alters nothing.
    """

    def __init__(
        self,
        *,
        clients: int,
        fraction: float,
        seed: int,
        buffers: Iterable[str] = (),
        per_sample: bool = False,
        adversary: Adversary | None = None,
    ) -> None:
        super().__init__(fraction_train=fraction, fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=clients)
        self.clients = clients
        self.seed = seed
        self.buffers = frozenset(buffers)
        self.per_sample = per_sample
        self.adversary = adversary or Adversary()
        self.partition_of: dict[int, int] = {}
        self.aggregated = 0
        self.train_loss = float("nan")
        self._sent: ArrayRecord | None = None

    def _meet(self, grid: Grid) -> None:
        """Learn every node's partition id; nodes may still be registering when the first round starts."""
        while len(nodes := list(grid.get_node_ids())) < self.clients:
            sleep(0.2)
        questions = [Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY) for node in nodes]
        for answer in grid.send_and_receive(questions):
            if answer.has_error():
                raise FedleakError(f"a client did not answer the server's first question: {answer.error.reason}")
            self.partition_of[answer.metadata.src_node_id] = int(client_record(answer)[PARTITION])  # type: ignore[arg-type]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model to this round's sample of clients, in the order of their partition ids."""
        if not self.partition_of:
            self._meet(grid)
        self._sent = arrays
        config["server-round"] = server_round
        by_partition = sorted(self.partition_of, key=lambda node: self.partition_of[node])
        count = max(1, round(self.fraction_train * len(by_partition)))
        order = torch.randperm(len(by_partition), generator=generator(self.seed, "sample", server_round))
        chosen = [by_partition[i] for i in sorted(order[:count].tolist())]
        messages: list[Message] = []
        state = to_tensors(arrays)
        shared = RecordDict({ARRAYS: arrays, CONFIG: config})
        for node in chosen:
            sent = self.adversary.send(server_round, self.partition_of[node], state)
            record = shared if sent is state else RecordDict({ARRAYS: to_arrays(sent), CONFIG: config})
            messages += self._construct_messages(record, [node], MessageType.TRAIN)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Weighted mean of the usable replies."""
        assert self._sent is not None
        sent = to_tensors(self._sent)
        usable: list[Message] = []
        for reply in sorted(replies, key=lambda r: self.partition_of.get(r.metadata.src_node_id, -1)):
            fault = reply.error.reason if reply.has_error() else self._fault(reply, sent)
            if fault is None:
                usable.append(reply)
            else:
                client = self.partition_of.get(reply.metadata.src_node_id)
                log.warning("round %d: client %s left out: %s", server_round, client, last_line(fault))
        self.aggregated = len(usable)
        if not usable:
            raise FedleakError(f"round {server_round}: no client returned a usable update; see the client errors above")
        if self.per_sample:
            usable = [self._mean_over_samples(reply) for reply in usable]
        arrays, metrics = super().aggregate_train(server_round, usable)
        assert arrays is not None
        assert metrics is not None
        self.train_loss = float(metrics["train_loss"])  # type: ignore[arg-type]
        return self._next(sent, arrays), metrics

    def _fault(self, reply: Message, sent: dict) -> str | None:
        try:
            update = to_tensors(reply.content.array_records[ARRAYS])
        except Exception as error:  # a reply of any form must not stop the federation
            return f"no readable {ARRAYS} record: {error}"
        names = [n for n in sent if n not in self.buffers]
        return find_fault(
            {n: v for n, v in update.items() if n not in self.buffers},
            {n: sent[n] for n in names},
            per_sample=self.per_sample,
        )

    def _mean_over_samples(self, reply: Message) -> Message:
        update = to_tensors(reply.content.array_records[ARRAYS])
        mean = {n: v if n in self.buffers else v.mean(0) for n, v in update.items()}
        return Message(
            RecordDict({**reply.content, ARRAYS: to_arrays(mean)}),
            dst_node_id=reply.metadata.dst_node_id,
            message_type=MessageType.TRAIN,
        )

    def _next(self, sent: dict, mean: ArrayRecord) -> ArrayRecord:
        """The next global model, from the one sent and the clients' mean answer: FedAvg takes the mean itself."""
        return mean


class FedSGD(RepeatableFedAvg):
    """Clients return gradients; the server takes one step of size `lr` along their weighted mean.

    Args:
        lr: the learning rate, shared with the clients.
    """

    def __init__(self, *, lr: float, **kwargs) -> None:
        super().__init__(**kwargs)
        self.lr = lr

    def _next(self, sent: dict, mean: ArrayRecord) -> ArrayRecord:
        gradient = to_tensors(mean)
        return to_arrays(
            {
                name: gradient[name] if name in self.buffers else value - self.lr * gradient[name]
                for name, value in sent.items()
            }
        )


def last_line(text: str | None) -> str:
    """The last line of an error, which in a traceback says what happened, fit for a terminal and a table."""
    lines = (text or "").strip().splitlines()
    return printable(lines[-1]) if lines else "unknown error"
