"""App forms × strategies, mods and training × verdicts: run ``python experiments/audit/study.py OUTPUT``.

Each case is a federation of plain Flower parts, run for some seeds in this process on a tapped grid, and audited from
its capture by what a user would state. Wrong statements are stated of the same captures.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import ServerApp, strategy
from torch import Tensor, nn
from torch.nn import functional as F

from fedleak.attacks.base import Knowledge
from fedleak.audit.findings import EXPOSED, INCONCLUSIVE, NOT_ATTACKABLE, NOT_SHOWN, Finding, Truth, examine
from fedleak.audit.preflight import CONTRADICTS, preflight
from fedleak.audit.statement import Statement
from fedleak.audit.tap import Tap
from fedleak.audit.watch import Watch
from fedleak.audit.wire import read
from fedleak.evaluation.intervals import wilson
from fedleak.federation.engine import LocalGrid, quiet_flower
from fedleak.models.normalized import normalized

NODES = 3


class Net(nn.Module):
    """The network of Flower's PyTorch quickstart, with BatchNorm where asked."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


@dataclass(frozen=True)
class Case:
    """A kind of federation.

    Attributes:
        name: of it.
        strategy: makes the server's.
        mods: the clients'.
        training: batch_size, steps, optimizer, lr and its settings.
        payload: what clients send.
        norm: whether the model has BatchNorm.
        keeps: whether clients keep their head.
        frozen: whether clients send their convolutions only.
        warm: steps that the model was trained for before.
        wrong: settings to state wrongly, each of them a case of its own.
    """

    name: str
    strategy: Callable[[], Any] = lambda: strategy.FedAvg(**PLAIN)
    mods: Callable[[], list[Any]] = list
    training: dict[str, Any] = field(default_factory=dict)
    payload: str = "weights"
    norm: bool = False
    keeps: bool = False
    frozen: bool = False
    warm: int = 0


PLAIN: dict[str, Any] = {"fraction_evaluate": 0.0, "min_train_nodes": NODES, "min_available_nodes": NODES}


def cases() -> Iterator[Case]:
    """All of them."""
    s = strategy
    yield Case("FedAvg")
    yield Case("FedProx", lambda: s.FedProx(proximal_mu=0.1, **PLAIN))
    yield Case("FedAvgM", lambda: s.FedAvgM(server_momentum=0.9, **PLAIN))
    yield Case("FedAdam", lambda: s.FedAdam(eta=0.01, **PLAIN))
    yield Case("FedYogi", lambda: s.FedYogi(eta=0.01, **PLAIN))
    yield Case("FedAdagrad", lambda: s.FedAdagrad(eta=0.01, **PLAIN))
    yield Case("QFedAvg", lambda: s.QFedAvg(client_learning_rate=0.1, **PLAIN))
    yield Case("FedMedian", lambda: s.FedMedian(**PLAIN))
    yield Case("Krum", lambda: s.Krum(num_malicious_nodes=0, **PLAIN))
    yield Case("FedTrimmedAvg", lambda: s.FedTrimmedAvg(beta=0.2, **PLAIN))
    dp: dict[str, Any] = {"noise_multiplier": 0.1, "num_sampled_clients": NODES}
    yield Case(
        "server clipping",
        lambda: s.DifferentialPrivacyServerSideFixedClipping(s.FedAvg(**PLAIN), clipping_norm=0.02, **dp),
    )
    yield Case("server adaptive", lambda: s.DifferentialPrivacyServerSideAdaptiveClipping(s.FedAvg(**PLAIN), **dp))
    yield Case(
        "client clipping",
        lambda: s.DifferentialPrivacyClientSideFixedClipping(s.FedAvg(**PLAIN), clipping_norm=0.02, **dp),
        lambda: [fixedclipping_mod],
    )
    yield Case(
        "client adaptive",
        lambda: s.DifferentialPrivacyClientSideAdaptiveClipping(s.FedAvg(**PLAIN), initial_clipping_norm=0.02, **dp),
        lambda: [adaptiveclipping_mod],
    )
    yield Case("local DP, weak", mods=lambda: [LocalDpMod(1.0, 0.0001, 1.0, 1e-5)])
    yield Case("local DP, strong", mods=lambda: [LocalDpMod(0.02, 0.02, 1.0, 1e-5)])
    yield Case("momentum, 1 step", training={"momentum": 0.9})
    yield Case("momentum, 5 steps", training={"momentum": 0.9, "steps": 5, "lr": 0.02})
    yield Case("5 steps", training={"steps": 5})
    yield Case("weight decay", training={"weight_decay": 0.01})
    yield Case("Adam", training={"optimizer": "adam", "lr": 0.001})
    yield Case("batch 8", training={"batch_size": 8})
    yield Case("BatchNorm, 3 steps", training={"steps": 3}, norm=True)
    yield Case("a change", payload="change")
    yield Case("a gradient", payload="gradient")
    yield Case("kept head", keeps=True)
    yield Case("frozen head", frozen=True)
    yield Case("trained", warm=100)


def images(labels: Tensor, generator: torch.Generator) -> Tensor:
    """``[B, 3, 32, 32]`` in [0, 1], a pattern a class and noise."""
    patterns = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    made = F.interpolate(patterns[labels], size=32, mode="bilinear")
    return (made + 0.25 * torch.randn(made.shape, generator=generator)).clamp(0, 1)


def client_app(case: Case, seed: int) -> ClientApp:
    """Clients that train as `case` says, each round on other samples."""
    app = ClientApp(mods=case.mods())
    t = case.training
    size, steps, lr = t.get("batch_size", 32), t.get("steps", 1), t.get("lr", 0.1)
    settings = {k: v for k, v in t.items() if k in ("momentum", "weight_decay")}
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[t.get("optimizer", "sgd")]
    rounds: dict[int, int] = {}

    @app.train()
    def train(message: Message, context: Context) -> Message:
        node = context.node_id
        rounds[node] = rounds.get(node, 0) + 1
        generator = torch.Generator().manual_seed(10_000 * seed + 100 * node + rounds[node])
        model = Net(case.norm)
        state = message.content["arrays"].to_torch_state_dict()
        model.load_state_dict({n: v.to(model.state_dict()[n].dtype) for n, v in state.items()})
        if case.keeps and "head" in context.state.array_records:
            model.fc3.load_state_dict(context.state["head"].to_torch_state_dict())
        start = {n: v.clone() for n, v in model.state_dict().items()}
        labels = torch.randint(10, (size * steps,), generator=generator)
        data = (images(labels, generator) - 0.5) / 0.5
        made = kind(model.parameters(), lr=lr, **settings)
        model.train()
        for x, y in zip(data.split(size), labels.split(size), strict=True):
            made.zero_grad()
            F.cross_entropy(model(x), y).backward()
            made.step()
        context.state["head"] = ArrayRecord(model.fc3.state_dict())
        sent = model.state_dict()
        if case.payload == "change":
            sent = {n: v - start[n] for n, v in sent.items()}
        elif case.payload == "gradient":
            sent = {n: p.grad for n, p in model.named_parameters()}
        if case.frozen:
            sent = {n: v for n, v in sent.items() if not n.startswith("fc3")}
        metrics = MetricRecord({"num-examples": len(labels), "train_loss": 1.0})
        return Message(RecordDict({"arrays": ArrayRecord(sent), "metrics": metrics}), reply_to=message)

    return app


def server_app(case: Case, seed: int, rounds: int, failures: list[str]) -> ServerApp:
    """A server of plain Flower parts."""
    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Context) -> None:
        torch.manual_seed(seed)
        model = Net(case.norm)
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(case.warm):
            labels = torch.randint(10, (32,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model((images(labels, generator) - 0.5) / 0.5), labels).backward()
            optimizer.step()
        arrays = ArrayRecord(model.state_dict())
        try:
            case.strategy().start(grid, arrays, num_rounds=rounds, train_config=ConfigRecord())
        except Exception as problem:  # a strategy that cannot do with what clients send has failed without us
            failures.append(f"{type(problem).__name__}: {problem}")

    return app


@dataclass(frozen=True)
class Row:
    """One audited update."""

    case: str
    seed: int
    round: int
    client: int
    stated: str
    preflight: str
    verdict: str
    expected: float
    accuracy: float | None
    right: bool


def audited(case: Case, seed: int, folder: Path, rounds: int) -> Iterator[Row]:
    """Run a federation and audit its capture by right and by wrong statements."""
    watch, failures = Watch(), list[str]()
    grid = LocalGrid(client_app(case, seed), NODES, around=watch.around)
    tap = Tap(grid, folder, quiet=True)
    server = server_app(case, seed, rounds, failures)
    server(tap, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={}))
    assert tap.folder is not None
    exchanges = read(tap.folder)
    truths = {s.message: Truth(s.truth[1]) for s in watch.sessions}
    t = {"batch_size": 32, "steps": 1, "lr": 0.1, "optimizer": "sgd", **case.training}
    steps = t.pop("steps")
    right = Statement(**t, epochs=1, payload=case.payload, keeps="fc3.weight+fc3.bias" if case.keeps else None)
    right = replace(right, source="stated")
    model = normalized(Net(case.norm), 0.5, 0.5)
    knowledge = Knowledge(model, (3, 32, 32), 10)
    yield from _rows(case, seed, exchanges, knowledge, right, truths, "right", examined=True)
    for name, statement in wrong(case, right, steps):
        yield from _rows(case, seed, exchanges[:NODES], knowledge, statement, truths, name, examined=False)


def wrong(case: Case, right: Statement, steps: int) -> Iterator[tuple[str, Statement]]:
    """What a user might state wrongly of such a capture."""
    exact = case.name in ("FedAvg", "5 steps", "batch 8", "BatchNorm, 3 steps", "trained")
    if exact:
        yield "lr ×10", replace(right, lr=10 * (right.lr or 0))
        yield "lr ÷10", replace(right, lr=(right.lr or 0) / 10)
        yield "batch ÷2", replace(right, batch_size=(right.batch_size or 2) // 2, steps=steps)
        yield "SGD as Adam", replace(right, optimizer="adam")
    if case.name == "momentum, 5 steps":
        yield "momentum left out", replace(right, momentum=0.0)
    if case.name == "Adam":
        yield "Adam as SGD", replace(right, optimizer="sgd")
    if case.name == "weight decay":
        yield "decay left out", replace(right, weight_decay=0.0)
    if case.name == "a change":
        yield "a change as weights", replace(right, payload="weights")


def _rows(
    case: Case,
    seed: int,
    exchanges: list[Any],
    knowledge: Knowledge,
    statement: Statement,
    truths: dict[str, Truth],
    name: str,
    *,
    examined: bool,
) -> Iterator[Row]:
    checked = preflight(exchanges, knowledge, [statement] * len(exchanges))
    found = examine(checked, knowledge, seconds=0, truths=truths) if examined else [None] * len(checked)
    for one, finding in zip(checked, found, strict=True):
        e = one.exchange
        verdict = finding.verdict if finding is not None else INCONCLUSIVE if one.verdict == CONTRADICTS else "–"
        expected = finding.accuracy if finding is not None else float("nan")
        accuracy = finding.label_accuracy if finding is not None else None
        ok = _right(case, finding) if finding is not None else verdict == INCONCLUSIVE
        yield Row(case.name, seed, e.round, e.client, name, one.verdict, verdict, round(expected, 3), accuracy, ok)


def _right(case: Case, finding: Finding) -> bool:
    """Whether a verdict on a rightly stated capture is right."""
    if case.frozen:
        return finding.verdict == NOT_ATTACKABLE
    if finding.verdict == INCONCLUSIVE or finding.label_accuracy is None:
        return False
    if finding.verdict == EXPOSED:
        return finding.label_accuracy >= 0.9
    if finding.verdict == NOT_SHOWN:
        return finding.label_accuracy < 0.95
    return finding.label_accuracy >= 0.79  # an even guess on 32 random labels of ten classes


def main() -> None:
    """Run all, write `updates.csv` and `verdicts.csv`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    quiet_flower()
    rows: list[Row] = []
    for case in cases():
        if options.only not in case.name:
            continue
        began = time.process_time()
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                rows += audited(case, seed, Path(folder), options.rounds)
        mine = [row for row in rows if row.case == case.name]
        for name in dict.fromkeys(row.stated for row in mine):
            some = [row for row in mine if row.stated == name]
            reached = [row.accuracy for row in some if row.accuracy is not None]
            mean = f"{sum(reached) / len(reached):.3f}" if reached else "–"
            told = ", ".join(f"{v} {sum(r.verdict == v for r in some)}" for v in dict.fromkeys(r.verdict for r in some))
            print(f"{case.name:20} {name:20} {told:40} labels {mean} right {sum(r.right for r in some)}/{len(some)}")
        print(f"  {time.process_time() - began:.1f} CPU s", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "updates.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row.__dataclass_fields__)
        writer.writerows([getattr(row, name) for name in Row.__dataclass_fields__] for row in rows)
    _summary(rows, options.output / "verdicts.csv")


def _summary(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("case", "stated", "updates", "verdicts", "label_accuracy", "right", "low", "high"))
        for case, stated in dict.fromkeys((row.case, row.stated) for row in rows):
            some = [row for row in rows if (row.case, row.stated) == (case, stated)]
            reached = [row.accuracy for row in some if row.accuracy is not None]
            told = ", ".join(f"{v} {sum(r.verdict == v for r in some)}" for v in dict.fromkeys(r.verdict for r in some))
            mean = round(sum(reached) / len(reached), 4) if reached else ""
            good = sum(row.right for row in some)
            low, high = wilson(good / len(some), len(some))
            writer.writerow((case, stated, len(some), told, mean, good, round(low, 3), round(high, 3)))


if __name__ == "__main__":
    main()
