"""Two engines for the same apps: in this process (default), or Flower's simulation on Ray."""

from __future__ import annotations

import copy
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedleak.errors import UsageError
from fedleak.executor import find_modules


class LocalGrid(Grid):
    """Flower's Grid without a network: a message is answered by calling the ClientApp, an exception by an error reply.

    Nodes are numbered 1…N and answer one after the other. Sender identity and message ids are private to Flower
    (`TaskIdentity`, `_message_id`); nothing outside this class touches them.
    """

    def __init__(
        self,
        client_app: ClientApp,
        clients: int,
        *,
        run_config: Mapping[str, Any] | None = None,
        around: Callable[[Message], AbstractContextManager[Any]] | None = None,
    ) -> None:
        """A grid of `clients` nodes.

        Args:
            client_app: the app that answers.
            clients: number of nodes.
            run_config: what the app finds in its context.
            around: makes what is entered around each answer, of the message that is answered.
        """
        self._app = client_app
        self._around = around or nullcontext
        self._run = Run.create_empty(run_id=1)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 0
        self._contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": node - 1, "num-partitions": clients},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for node in range(1, clients + 1)
        }
        self._replies: dict[str, Message] = {}
        self._count = 0

    def set_run(self, run: Any) -> None:
        """Not needed: there is one run."""

    @property
    def run(self) -> Any:
        """A run by number; nothing else is known of it in this process."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, always connected."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver and answer each message at once."""
        ids = []
        for message in messages:
            self._count += 1
            message.metadata.__dict__["_message_id"] = str(self._count)
            self._replies[str(self._count)] = self._answer(message)
            ids.append(str(self._count))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers to `message_ids`, each once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then pull."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        # Messages of a round share one content, and a client may change what it gets: each receives a copy.
        received = Message(copy.deepcopy(message.content), metadata=copy.copy(message.metadata))  # type: ignore[call-overload]
        try:
            with self._around(message):
                return self._app(received, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            return Message(Error(code=0, reason=f"{type(error).__name__}: {error}"), reply_to=received)


@dataclass(frozen=True)
class LocalEngine:
    """Clients run one after the other in this process: no start-up, the fastest for small models."""

    def run(self, server_app: ServerApp, client_app: ClientApp, clients: int) -> None:
        """Run the federation to its end."""
        quiet_flower()
        grid = LocalGrid(client_app, clients)
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
        server_app(grid, context)


@dataclass(frozen=True)
class GivenGrid:
    """A grid that Flower handed to a ServerApp: the clients are elsewhere, in a real deployment say.

    Args:
        grid, context: what the ServerApp's main was called with.
    """

    grid: Grid
    context: Context

    def run(self, server_app: ServerApp, client_app: ClientApp, clients: int) -> None:
        """Run the server's side of the federation to its end; `client_app` and `clients` are those behind the grid."""
        quiet_flower()
        server_app(self.grid, self.context)


@dataclass(frozen=True)
class RayEngine:
    """Flower's simulation on Ray: clients run in parallel processes.

    Args:
        num_cpus, num_gpus: what Ray reserves for one client. GPU shares are accounting only: leave room for the
            attacker, which runs in the server's process.
    """

    num_cpus: float = 1
    num_gpus: float = 0.0
    init_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, value in (("num_cpus", self.num_cpus), ("num_gpus", self.num_gpus)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 10**6:
                raise UsageError(f"engine.{key}={value}: give a number from 0")
        there = os.cpu_count() or 1
        if "address" in self.init_args or "num_cpus" in self.init_args or "num_gpus" in self.init_args:
            return  # a cluster, or what the user says is there
        if self.num_cpus > there:
            raise UsageError(f"engine.num_cpus={self.num_cpus}: no client would ever start, this machine has {there}")
        if self.num_gpus > 0:
            import torch

            if self.num_gpus > torch.cuda.device_count():
                raise UsageError(f"engine.num_gpus={self.num_gpus}: this machine has {torch.cuda.device_count()}")

    def run(self, server_app: ServerApp, client_app: ClientApp, clients: int) -> None:
        """Run the federation to its end; raises what the server raised."""
        find_modules()
        from flwr.simulation import run_simulation

        quiet_flower()
        with _mortal():
            run_simulation(
                server_app,
                client_app,
                num_supernodes=clients,
                backend_config={
                    "client_resources": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
                    "init_args": {"log_to_driver": False, "logging_level": logging.ERROR, **self.init_args},
                },
            )


@contextmanager
def _mortal() -> Iterator[None]:
    """Ctrl-C ends Ray's processes and this one at once.

    Flower's server and worker threads wait for replies for up to an hour and cannot be told to stop. What is on disk is
    whole whenever a process ends, and ``fedleak run resume=DIR`` goes on with it.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def end(number: int, frame: Any) -> None:
        import psutil

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("fedleak: interrupted; fedleak run resume=DIR goes on with it", file=sys.stderr, flush=True)
        for child in psutil.Process().children(recursive=True):  # of the cluster that was started for this run
            with suppress(psutil.Error):
                child.kill()
        os._exit(130)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def quiet_flower() -> None:
    """Flower logs dozens of lines a round; ours are a progress bar and tables."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
