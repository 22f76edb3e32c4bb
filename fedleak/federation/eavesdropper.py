"""The malicious aggregator: wraps any Flower strategy and keeps what every client sends, every round."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedleak.attacks.views import shown
from fedleak.audit.fit import rename
from fedleak.audit.steps import reconcile
from fedleak.audit.tap import Passing
from fedleak.capture import CaptureInfo, CaptureStore
from fedleak.errors import FedleakError, printable
from fedleak.federation import claims
from fedleak.federation.records import ARRAYS, PARTITION, client_record, records_of, to_tensors
from fedleak.federation.strategy import last_line
from fedleak.observation import Observation, find_fault
from fedleak.rounds import Keep
from fedleak.threat import ThreatModel
from fedleak.training import SGD, ClientOptimizer, LocalTraining, Payload, Tensors

log = logging.getLogger("fedleak")


class Eavesdropper(Strategy):
    """An honest-but-curious server: the federation runs as before, and every update is captured.

    Wrapping the strategy of your own Flower app is one line::

        strategy = Eavesdropper(FedAvg(...), "captures", model=Net(), lr=0.1, batch_size=8)

    It changes nothing that the wrapped strategy sends, receives or computes, and must stay outermost so that it sees
    what the server sees. The wrapped strategy's own ``start``, methods and attributes are there as before. Attack the
    captures with `fedleak.attack`.

    Args:
        strategy: any Flower strategy (Message API).
        captures: folder for the captures; a second run that names it gets a folder ``run-2``, … inside.
        model: the shared model, whose parameters and buffers name the arrays; without it, every array counts as a
            parameter, in order.
        threat: what the attacker is granted; what is withheld is never written.
        payload: ``weights`` if clients return new weights (Flower's usual way), ``gradient`` if gradients.
        lr, local_steps, batch_size: what the server knows of its clients' training. A reply's or its message's own
            ``lr`` and ``local-steps`` go first; where no batch size is named, a reply's ``num-examples`` gives it (of
            all local steps together, where their number is not known either).
        image_shape, classes: (C, H, W) and number of classes, for the attack.
        optimizer: the clients' optimiser, plain SGD unless named; its learning rate gives way to an ``lr`` as above.
        epochs: how often clients go over their `local_steps` batches.
        training_mode: whether clients train in train mode.
        per_sample: clients return each sample's gradient (iDLG's per-sample scenario).
        client_of: node id -> client number; by default what a reply's ``partition-id`` says, else the node's order.
        every: keep the updates of rounds 1, 1 + every, … only, which a long federation's disk may demand.
        keep: which updates are kept beyond that, all unless named.
        on_round: called with a round's observations as soon as they are captured, for an attack inline.
        quiet: do not print where the captures are.
        store: captures of earlier rounds of the same run, to go on with; None begins anew.
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
        optimizer: ClientOptimizer | None = None,
        epochs: int = 1,
        client_of: Callable[[int], int | None] | None = None,
        every: int = 1,
        keep: Keep | None = None,
        on_round: Callable[[int, list[Observation]], None] | None = None,
        quiet: bool = False,
        store: CaptureStore | None = None,
    ) -> None:
        self.strategy = strategy
        self.threat = threat or ThreatModel()
        self.keep = replace(keep or Keep(), every=every)
        info = CaptureInfo(self.threat, image_shape, classes, training_mode)
        dtype = None if self.keep.dtype is None else getattr(torch, self.keep.dtype)
        self.store = store or CaptureStore.create(_free(captures), info, dtype=dtype)
        if not quiet:
            print(f"fedleak: capturing in {self.store.folder}", file=sys.stderr, flush=True)
        if optimizer is None and lr is not None:
            optimizer = SGD(lr)
        elif optimizer is not None and lr is not None:
            optimizer = replace(optimizer, lr=lr)
        self.training = LocalTraining(payload, batch_size, local_steps, epochs, optimizer, training_mode, per_sample)
        self.model = model
        self.names = None if model is None else (_trained(model), list(model.state_dict()))
        self._buffers = set() if self.names is None else set(self.names[1]) - set(self.names[0])
        self.client_of = client_of
        self.on_round = on_round
        self._sent: dict[int, _Sent] = {}
        self._names_of: dict[tuple[tuple[str, torch.Size], ...], dict[str, str]] = {}
        self._order: dict[int, int] = {}
        self._warned: set[str] = set()
        self._claimed: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "strategy":  # while this object is being made or unpickled
            raise AttributeError(name)
        return getattr(self.strategy, name)

    def start(self, grid: Grid, *arguments: Any, **named: Any) -> Any:
        """Let the wrapped strategy start itself, its own way, on a grid that is listened to."""
        try:
            result = self.strategy.start(_Listening(grid, self), *arguments, **named)
        except BaseException:
            self.store.flush()
            raise
        self.store.close()  # complete, and says so
        return result

    def summary(self) -> None:
        """Log the wrapped strategy's summary."""
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapped strategy configure the round, and note what it sends to whom."""
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._note(messages)
        return messages

    def _note(self, messages: Iterable[Message]) -> None:
        """What a round's messages carry."""
        self._sent = {}
        read: dict[int, _Sent] = {}  # messages may share their content, or its arrays
        for message in messages:
            content = message.content
            if id(content) not in read:
                arrays = records_of(content, ArrayRecord)
                key, carried = next(iter(arrays.items()), (ARRAYS, ArrayRecord()))
                if self.names is not None:  # a model may travel beside other arrays
                    fits = ((k, r) for k, r in arrays.items() if len(r) == len(self.names[1]))
                    key, carried = next(fits, (key, carried))
                if id(carried) not in read:
                    read[id(carried)] = _Sent(*self._split(self._named(to_tensors(carried))), {})
                own: Mapping[str, Any] = next(iter(records_of(content, ConfigRecord).values()), {})
                read[id(content)] = replace(read[id(carried)], config=own, key=key)
            self._sent[message.metadata.dst_node_id] = read[id(content)]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Capture every reply, then let the wrapped strategy aggregate the same replies untouched."""
        replies = list(replies)
        self._keep(server_round, replies)
        return self.strategy.aggregate_train(server_round, replies)

    def _keep(self, server_round: int, replies: Sequence[Message]) -> None:
        if not self.keep.of_round(server_round):
            return
        observations = sorted((self._observe(server_round, reply) for reply in replies), key=lambda o: o.client)
        observations = shown(self.threat.view, observations)
        observations = [o for o in observations if self.keep(server_round, o.client)]
        for observation in observations:
            self.store.put(observation)
        self.store.end_round()
        if self.on_round is not None:
            self.store.flush()
            self.on_round(server_round, observations)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Pass on."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Pass on."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def _named(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Arrays by the model's own names: apps number theirs "0", "1", …, wrap the model, or send a part of it."""
        if self.model is None:
            return tensors
        looks = tuple((key, value.shape) for key, value in tensors.items())
        if looks not in self._names_of:
            self._names_of = {looks: rename(tensors, self.model)}  # the last ones: replies look alike
        names = self._names_of[looks]
        return {names.get(key, key): value for key, value in tensors.items()}

    def _split(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(parameters, buffers) of a model's arrays."""
        if not self._buffers:
            return tensors, {}
        return (
            {name: value for name, value in tensors.items() if name not in self._buffers},
            {name: value for name, value in tensors.items() if name in self._buffers},
        )

    def _whole(self, update: Tensors, sent: _Sent, payload: Payload) -> Tensors:
        """An update by the model that is known: what did not come back stayed as it was, what is no part of it goes."""
        if self.names is None or not set(update) & set(sent.parameters):
            return update
        if update.keys() == sent.parameters.keys():
            return update
        frozen = {n: v if payload == "weights" else torch.zeros_like(v) for n, v in sent.parameters.items()}
        return {name: update.get(name, value) for name, value in frozen.items()}

    def _observe(self, server_round: int, reply: Message) -> Observation:
        sent = self._sent.get(reply.metadata.src_node_id, _Sent({}, {}, {}))
        says = client_record(reply)
        client, doubt = self._client(reply, says)
        seen = Observation(server_round, client, sent.parameters, {}, self.training, sent.buffers)
        if reply.has_error():
            return replace(seen, error=f"client error: {last_line(reply.error.reason)}")
        try:
            if doubt is not None:
                raise claims.Claim(doubt)
            training = self._training(reply, sent.config, says)
            record = claims.arrays_of(reply, sent.key, {**sent.parameters, **sent.buffers})
            update, buffers = self._split(self._named(to_tensors(record)))
            update = self._whole(update, sent, training.payload)
            fault = find_fault(update, sent.parameters, per_sample=training.per_sample)
            if fault is None and (buffers or sent.buffers):
                fault = find_fault({**sent.buffers, **buffers}, sent.buffers)
            labels = claims.class_labels(says, self.store.info.classes)
        except claims.Claim as problem:
            return replace(seen, error=f"bad reply: {last_line(str(problem))}")
        except Exception as problem:  # a reply of any form must not stop the federation
            return replace(seen, error=f"bad update: {type(problem).__name__}: {last_line(str(problem))}")
        if fault is not None:
            update, buffers, fault = {}, {}, f"bad update: {last_line(fault)}"
        named = None if labels is None else torch.tensor(labels)
        return replace(seen, update=update, training=training, buffers=buffers, labels=named, error=fault)

    def _training(self, reply: Message, config: Mapping[str, Any], says: Mapping[str, Any]) -> LocalTraining:
        """What is known of a client's training, its own word first; FedleakError where that cannot be."""
        training = self.training
        stated = config.get("lr", training.lr)
        if training.lr is not None and stated != training.lr and not says:
            self._warn("lr=%s was stated, and the messages say %s, which goes first", training.lr, printable(stated))
        with contextlib.suppress(FedleakError):  # a server may mean something else by its words
            training = claims.told(training, config)
        training = claims.told(training, says)
        examples = claims.examples(reply)
        # One of our clients counts right; any other app's batch size is what its wrapper says, where it says one.
        if examples is not None and (says or training.batch_size is None):
            size = max(1, round(examples / (training.local_steps or 1)))
            training = training if size == training.batch_size else replace(training, batch_size=size)
        elif examples is not None and training.batch_size is not None:
            found = reconcile(
                examples=round(examples), batch_size=training.batch_size, steps=training.steps, epochs=training.epochs
            )
            if found.contradiction is not None:
                self._warn("%s: what was stated cannot be true of this reply", found.contradiction)
            else:
                training = replace(training, batch_size=found.batch_size, local_steps=found.local_steps)
        return training

    def _warn(self, words: str, *values: Any) -> None:
        """Say it once, whatever the number of replies."""
        if words not in self._warned:
            self._warned.add(words)
            log.warning(words, *values)

    def _client(self, reply: Message, says: Mapping[str, Any]) -> tuple[int, str | None]:
        """A client's number, and why what it says of it is not believed, if so."""
        node = reply.metadata.src_node_id
        if self.client_of is not None and (client := self.client_of(node)) is not None:
            return client, None
        try:
            claimed = claims.whole(says, PARTITION, least=0)
        except claims.Claim as problem:
            return self._numbered(node), str(problem)
        if claimed is None:
            return self._numbered(node), None
        if self._claimed.setdefault(claimed, node) != node:
            return self._numbered(node), f"{PARTITION}={claimed} is another node's"
        return claimed, None

    def _numbered(self, node: int) -> int:
        """A number for a node that names none, for the whole run; sorting makes the first independent of arrival."""
        for other in sorted({*self._sent, node}):
            if other not in self._order:
                taken = {*self._order.values(), *self._claimed}
                self._order[other] = next(n for n in itertools.count(len(self._order)) if n not in taken)
        return self._order[node]


@dataclass(frozen=True)
class _Sent:
    """What one message carried."""

    parameters: Tensors
    buffers: Tensors
    config: Mapping[str, Any]
    key: str = ARRAYS


class _Listening(Passing):
    """A grid whose training messages and replies are those of an eavesdropper's rounds."""

    def __init__(self, grid: Grid, eavesdropper: Eavesdropper) -> None:
        super().__init__(grid)
        self._eavesdropper = eavesdropper
        self._round = 0
        self._training = False

    def sends(self, messages: list[Message]) -> None:
        """Note a round's messages; its number is what they say, or one more than the last where they say no new one."""
        self._training = bool(messages) and messages[0].metadata.message_type.split(".")[0] == MessageType.TRAIN
        if self._training:
            config: Mapping[str, Any] = next(iter(messages[0].content.config_records.values()), {})
            says = config.get("server-round")
            self._round = says if isinstance(says, int) and says > self._round else self._round + 1
            self._eavesdropper._note(messages)

    def hears(self, replies: list[Message]) -> None:
        """Keep a round's replies."""
        if self._training and replies:
            self._eavesdropper._keep(self._round, replies)


def _trained(model: nn.Module) -> list[str]:
    return [name for name, value in model.named_parameters() if value.requires_grad]


def _free(captures: str | Path) -> Path:
    """The folder itself, or one in it if it holds captures of an earlier run; absolute."""
    folder = Path(captures).absolute()
    taken, number = folder, 1
    while (taken / "index.jsonl").exists():
        number += 1
        taken = folder / f"run-{number}"
    return taken
