"""Any Flower strategy made repeatable: clients are sampled, summed and drawn for by partition id, not by node id."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from time import sleep
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from fedleak.errors import FedleakError, UsageError, printable
from fedleak.federation import claims
from fedleak.federation.adversary import Adversary
from fedleak.federation.records import (
    ARRAYS,
    CONFIG,
    EXAMPLES,
    METRICS,
    PARTITION,
    client_record,
    to_arrays,
    to_tensors,
)
from fedleak.observation import find_fault
from fedleak.seeding import derive_seed, generator
from fedleak.training import Tensors

log = logging.getLogger("fedleak")


def sampled(seed: int, clients: int, fraction: float, server_round: int) -> list[int]:
    """The clients that take part in a round, by number; at least one."""
    count = max(1, round(fraction * clients))
    order = torch.randperm(clients, generator=generator(seed, "sample", server_round))
    return sorted(order[:count].tolist())


def dropped(seed: int, chosen: Sequence[int], dropout: float, server_round: int) -> frozenset[int]:
    """Those of a round's clients that will not answer; at least one of them always does."""
    count = min(len(chosen) - 1, round(dropout * len(chosen)))
    order = torch.randperm(len(chosen), generator=generator(seed, "dropout", server_round))
    return frozenset(chosen[i] for i in order[:count].tolist())


class Repeatable(Strategy):
    """A Flower strategy whose result depends on the seed alone, and that survives clients which fail.

    Node ids are random in every run and replies arrive in any order. So every node is first asked for its partition id
    (a QUERY message); the wrapped strategy then meets only the nodes that are sampled for the round, gets replies in
    the order of partitions, and draws from seeded generators. Replies that carry an error, a wrong shape or a value
    that is not finite are left out; if none is left the round raises. The strategy sees parameters alone: buffers are
    averaged by examples, whatever it does. Nothing is evaluated on clients.

    Args:
        strategy: any of Flower's (Message API), or your own; of its sampling nothing is left.
        clients: how many nodes the federation has; training starts when all of them are connected.
        fraction: share of the clients sampled each round, at least one.
        seed: decides every draw.
        buffers: names of the arrays that are buffers, not parameters.
        per_sample: updates have a leading sample dimension, averaged here.
        adversary: alters what is sent to each client; None alters nothing.
        most_examples: a client that counts more is not believed.
        step: where clients return gradients: round -> the server's learning rate (FedSGD). The strategy then gets each
            client's model after one such step; of the plain mean, which needs no detour, the step itself is taken.

    Attributes:
        done: rounds that were finished before the federation was interrupted; the first one now is the next of them.

    Raises:
        UsageError: the strategy samples by itself, or counts with another number of clients.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        clients: int,
        fraction: float,
        seed: int,
        buffers: Iterable[str] = (),
        per_sample: bool = False,
        adversary: Adversary | None = None,
        step: Callable[[int], float] | None = None,
        most_examples: int = claims.MOST,
    ) -> None:
        self.strategy = strategy
        self.clients = clients
        self.fraction = fraction
        self.seed = seed
        self.buffers = frozenset(buffers)
        self.per_sample = per_sample
        self.adversary = adversary or Adversary()
        self.step = step
        self.most_examples = most_examples
        self.left_out = 0
        self.done = 0
        self.partition_of: dict[int, int] = {}
        self.aggregated = 0
        self.train_loss = float("nan")
        self._sent: Tensors = {}
        _take_sampling(strategy, max(1, round(fraction * clients)))

    def summary(self) -> None:
        """Log the wrapped strategy's summary."""
        self.strategy.summary()

    def _meet(self, grid: Grid) -> None:
        """Learn every node's partition id; nodes may still be registering when the first round starts."""
        while len(nodes := list(grid.get_node_ids())) < self.clients:
            sleep(0.2)
        questions = [Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY) for node in nodes]
        for answer in grid.send_and_receive(questions):
            node, problem = answer.metadata.src_node_id, None
            if answer.has_error():
                problem = answer.error.reason
            else:
                try:
                    says: Mapping[str, Any] = client_record(answer)
                    number = claims.whole(says, PARTITION, least=0)
                    problem = "says no number" if number is None else None
                    problem = "says another's number" if number in self.partition_of.values() else problem
                except Exception as error:  # an answer of any form must not stop the federation
                    problem = str(error)
            if problem is None and number is not None:
                self.partition_of[node] = number
            else:
                log.warning("a client takes no part, its first answer is unusable: %s", last_line(problem))
        if not self.partition_of:
            raise FedleakError("no client answered the server's first question; see the warnings above")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model to this round's sample of clients, in the order of their partition ids."""
        server_round += self.done
        if not self.partition_of:
            self._meet(grid)
        self._sent = to_tensors(arrays)
        config["server-round"] = server_round
        nodes = sorted(self.partition_of, key=lambda node: self.partition_of[node])
        chosen = [nodes[i] for i in sampled(self.seed, len(nodes), self.fraction, server_round)]
        known = arrays if not self.buffers else to_arrays(self._parameters(self._sent))
        with self._seeded("configure", server_round):
            messages = list(self.strategy.configure_train(server_round, known, config, _only(grid, chosen)))
        shared: dict[int, tuple[RecordDict, Tensors]] = {}  # messages may share their content
        sent: list[Message] = []
        for message in sorted(messages, key=lambda m: self.partition_of[m.metadata.dst_node_id]):
            if id(message.content) not in shared:
                carried = next(iter(message.content.array_records.values()))
                own = next(iter(message.content.config_records.values()), config)
                whole = {**self._sent, **to_tensors(carried)}
                state_sent = arrays if carried is known else to_arrays(whole)
                shared[id(message.content)] = RecordDict({ARRAYS: state_sent, CONFIG: own}), whole
            record, state = shared[id(message.content)]
            node = message.metadata.dst_node_id
            altered = self.adversary.send(server_round, self.partition_of[node], state)
            if altered is not state:
                record = RecordDict({ARRAYS: to_arrays(altered), CONFIG: record.config_records[CONFIG]})
            sent.append(Message(record, dst_node_id=node, message_type=MessageType.TRAIN))
        return sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the strategy makes of the usable replies."""
        server_round += self.done
        usable: list[Message] = []
        for reply in sorted(replies, key=lambda r: self.partition_of.get(r.metadata.src_node_id, -1)):
            fault = reply.error.reason if reply.has_error() else self._fault(reply)
            if fault is None:
                usable.append(reply)
            else:
                client = self.partition_of.get(reply.metadata.src_node_id)
                self.left_out += 1
                log.warning("round %d: client %s left out: %s", server_round, client, last_line(fault))
        self.aggregated = len(usable)
        if not usable:
            raise FedleakError(f"round {server_round}: no client returned a usable update; see the client errors above")
        updates = [to_tensors(reply.content.array_records[ARRAYS]) for reply in usable]
        if self.per_sample:
            updates = [{n: v if n in self.buffers else v.mean(0) for n, v in u.items()} for u in updates]
        rate, parameters = 0.0 if self.step is None else self.step(server_round), self._parameters(self._sent)
        later = self.step is not None and type(self.strategy) is FedAvg
        models = self.step is not None and not later
        asked = [{n: p - rate * u[n] if models else u[n] for n, p in parameters.items()} for u in updates]
        with self._seeded("aggregate", server_round):
            contents = [_with(reply, update) for reply, update in zip(usable, asked, strict=True)]
            arrays, metrics = self.strategy.aggregate_train(server_round, contents)
        if arrays is None or metrics is None:
            raise FedleakError(
                f"round {server_round}: {type(self.strategy).__name__} made no model of {len(usable)} updates"
            )
        self.train_loss = float(metrics["train_loss"])  # type: ignore[arg-type]
        found = {n: value.to(parameters[n].dtype) for n, value in to_tensors(arrays).items()}
        if later:
            found = {n: p - rate * found[n] for n, p in parameters.items()}
        return to_arrays({n: found[n] if n in found else self._mean(n, usable, updates) for n in self._sent}), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: the server has test images of its own."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing."""
        return None

    def _parameters(self, state: Tensors) -> Tensors:
        return {name: value for name, value in state.items() if name not in self.buffers}

    def _mean(self, name: str, replies: Sequence[Message], updates: Sequence[Tensors]) -> torch.Tensor:
        """A buffer's mean over clients, weighted by examples."""
        counts = [float(reply.content.metric_records[METRICS][EXAMPLES]) for reply in replies]  # type: ignore[arg-type]
        return sum(c / sum(counts) * u[name] for c, u in zip(counts, updates, strict=True))  # type: ignore[return-value]

    def _fault(self, reply: Message) -> str | None:
        """Why a reply cannot be averaged."""
        try:
            update = to_tensors(reply.content.array_records[ARRAYS])
        except Exception as error:  # a reply of any form must not stop the federation
            return f"no readable {ARRAYS} record: {error}"
        try:
            counted: Mapping[str, Any] = reply.content.metric_records[METRICS]
            if claims.number(counted, EXAMPLES, least=1, most=self.most_examples) is None:
                return f"{EXAMPLES} is missing"
            if not isinstance(counted.get("train_loss"), int | float):
                return "train_loss is no number"
        except Exception as error:
            return f"no readable {METRICS} record: {error}"
        buffers = {name: value for name, value in self._sent.items() if name in self.buffers}
        strange = find_fault({name: value for name, value in update.items() if name in buffers}, buffers)
        return strange or find_fault(self._parameters(update), self._parameters(self._sent), per_sample=self.per_sample)

    @contextlib.contextmanager
    def _seeded(self, what: str, server_round: int) -> Iterator[None]:
        """Flower's strategies draw from the global generators of Python and NumPy; here they get this round's own."""
        before, numbers = random.getstate(), np.random.get_state()
        seed = derive_seed(self.seed, "strategy", what, server_round) % 2**32
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numbers)


def _take_sampling(strategy: Strategy, count: int) -> None:
    """Let a strategy, and those that it wraps, take every node that it meets."""
    inner: Any = strategy
    while inner is not None:
        if not isinstance(inner, Strategy):
            raise UsageError(f"strategy.strategy={inner}: must be a strategy, a _target_ with its settings")
        inner = cast(Any, inner)
        if getattr(inner, "fraction_train", 1.0) != 1.0:
            raise UsageError(f"strategy.fraction_train={inner.fraction_train}: give federation.fraction instead")
        expected = getattr(inner, "num_sampled_clients", count)
        if expected != count:
            raise UsageError(
                f"strategy.num_sampled_clients={expected}: federation.clients and federation.fraction make it {count}; "
                "set it to that"
            )
        inner.fraction_evaluate, inner.min_train_nodes, inner.min_available_nodes = 0.0, 1, 1
        inner = getattr(inner, "strategy", None)


def _only(grid: Grid, nodes: Sequence[int]) -> Grid:
    """The grid as a strategy meets it that is to take just these nodes."""

    class Few:
        def get_node_ids(self) -> Iterable[int]:
            return list(nodes)

        def __getattr__(self, name: str) -> Any:
            return getattr(grid, name)

    return cast(Grid, Few())


def _with(reply: Message, update: Tensors) -> Message:
    """A reply of a single client, with other arrays."""
    message = Message(
        RecordDict({ARRAYS: to_arrays(update), METRICS: _counted(reply)}),  # whatever else it holds stays out
        dst_node_id=reply.metadata.dst_node_id,
        message_type=MessageType.TRAIN,
    )
    message.metadata.__dict__["_src_node_id"] = reply.metadata.src_node_id
    return message


def _counted(reply: Message) -> MetricRecord:
    """The numbers that our clients send, and no others, which not all may send."""
    said = reply.content.metric_records[METRICS]
    return MetricRecord({name: said[name] for name in (EXAMPLES, "train_loss")})


def last_line(text: str | None) -> str:
    """The last line of an error, which in a traceback says what happened, fit for a terminal and a table."""
    lines = (text or "").strip().splitlines()
    return printable(lines[-1]) if lines else "unknown error"
