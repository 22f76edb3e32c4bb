"""``fedleak audit``: an app or a capture, from the command line to a verdict."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedleak.attacks.base import Knowledge
from fedleak.audit.app import read_app, run_app
from fedleak.audit.findings import Truth, examine
from fedleak.audit.normalisation import PLAIN, Normalization, look, told, with_look
from fedleak.audit.preflight import Preflight, preflight, worst
from fedleak.audit.report import EXIT_CODES, Audit, write
from fedleak.audit.shapes import guess_normalization, infer_classes, infer_shape
from fedleak.audit.statement import Statement, by_session, parse
from fedleak.audit.truth import read_truth
from fedleak.audit.wire import Exchange, find_runs, known_shape, read
from fedleak.console import Console
from fedleak.devices import resolve_device
from fedleak.errors import UsageError
from fedleak.instantiate import locate
from fedleak.models.normalized import normalized

HELP = """fedleak audit: what do a Flower federation's updates give away?

  fedleak audit APP_DIR [--nodes N] [--rounds R] [--run-config 'key=value …']
      run an app's own ServerApp and ClientApp in this process, nothing about it changed, and audit its updates

  fedleak audit CAPTURES --model package.module:Net
      audit what fedleak.tap or an Eavesdropper captured

  --client optimizer=sgd,lr=0.1,momentum=0.9,batch_size=32,epochs=1   how clients train, as far as it is known
  --client package.module:train                                       or their own function, run once to see
  --normalize MEAN/STD      how clients normalise images, such as 0.5/0.5 or 0.49,0.48,0.45/0.25,0.24,0.26
  --image-shape C,H,W       of one image, where the model does not tell
  --truth DIR               what clients noted with fedleak.note_truth, for scores
  --seconds S               for rebuilding images, all together (60; 0 for none)
  --output DIR              where audit.html, audit.json and an app's capture go (audit/)
  --device auto|cpu|cuda, --seed N

It returns 0 where nothing was shown, 3 exposed, 4 partly, 5 inconclusive (1 and 2 are errors).
"""
VALUES = (
    "--nodes",
    "--rounds",
    "--run-config",
    "--model",
    "--client",
    "--normalize",
    "--image-shape",
    "--truth",
    "--seconds",
    "--output",
    "--device",
    "--seed",
)
APP_ONLY = ("--nodes", "--rounds", "--run-config")


@dataclass(frozen=True)
class Options:
    """What was typed."""

    target: Path
    given: Mapping[str, str]

    def number(self, name: str, default: float | None, *, least: float = 1, kind: type = int) -> Any:
        """A number's value."""
        text = self.given.get(name)
        if text is None:
            return default
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= least or value == float("inf"):
            raise UsageError(f"{name}={text}: no number it can be; give one from {least}")
        return value

    @property
    def output(self) -> Path:
        """Where the results go."""
        return Path(self.given.get("--output", "audit"))


def read_options(arguments: Sequence[str]) -> Options:
    """Read the command line.

    Raises:
        UsageError: an unknown option, one without a value, or not exactly one target.
    """
    given: dict[str, str] = {}
    targets = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            targets.append(word)
        elif name not in VALUES:
            raise UsageError(f"{word}: unknown option; known: {', '.join(VALUES)}")
        elif not equals and not rest:
            raise UsageError(f"{name}: has no value; see fedleak audit --help")
        else:
            given[name] = value if equals else rest.pop(0)
    if len(targets) != 1:
        raise UsageError(f"fedleak audit: {len(targets)} targets named; name one app's folder, or one of captures")
    target = Path(targets[0])
    if not target.is_dir():
        raise UsageError(f"{target}: no such folder; name a Flower app's, or one of captures")
    return Options(target, given)


def audit(arguments: Sequence[str]) -> int:
    """``fedleak audit``; returns the exit code, see `EXIT_CODES`."""
    if {"--help", "-h"} & set(arguments):
        print(HELP, end="")
        return 0
    options = read_options(arguments)
    console = Console()
    is_app = (options.target / "pyproject.toml").is_file() and not (options.target / "index.jsonl").is_file()
    source = _of_app(options, console) if is_app else _of_captures(options)
    console.say(f"{len(source.exchanges)} updates of {source.name}")
    seed = options.number("--seed", 0, least=0)
    device = resolve_device(options.given.get("--device", "auto"))
    checked, knowledge, looks = _checked(source, seed)
    with console.steps("audit", len(checked)) as step:
        found = examine(
            checked,
            knowledge,
            seed=seed,
            device=device,
            seconds=options.number("--seconds", 60.0, least=0, kind=float),
            truths=source.truths,
            on_done=lambda done: step(1, f"{done}"),
        )
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in worst(checked).items() if count)
    facts = {**source.facts, **looks, "assumptions": verdicts}
    result = Audit(source.name, found, shlex.join(["fedleak", "audit", *arguments]), facts)
    write(result, options.output)
    for finding in found[:20]:
        exchange = finding.preflight.exchange
        console.say(f"round {exchange.round}, node {exchange.node}: {finding.verdict}: {finding.words}")
    console.say(f"verdict: {result.verdict}")
    console.say(f"the whole story on one page: {options.output.absolute() / 'audit.html'}")
    return EXIT_CODES[result.verdict]


def _checked(source: Source, seed: int) -> tuple[list[Preflight], Knowledge, dict[str, str]]:
    """The preflights, the model with the images' normalisation in front of it, and what is said of that."""
    checked = preflight(source.exchanges, source.knowledge, source.statements, seed=seed)
    if source.seen:
        return checked, source.knowledge, {}
    found = look(checked, source.plain, source.knowledge, source.stated, seed=seed)
    if found is None:
        words = "as stated; not checked" if source.stated else "unknown; none is assumed"
        return checked, source.knowledge, {"images": words}
    knowledge = source.knowledge
    if source.stated is None and found.best != PLAIN:
        knowledge = replace(knowledge, model=normalized(source.plain, *found.best))
    return with_look(checked, found), knowledge, {"images": found.check.words}


@dataclass(frozen=True)
class Source:
    """What there is to audit.

    Attributes:
        name: of it.
        exchanges, statements: N updates, and what is held to be true of each client's training.
        knowledge: the model, its images and classes.
        truths: message id -> what was really in it.
        facts: for the page.
        plain: the model, that takes normalised images.
        stated: how they are normalised; None if nobody says.
        seen: whether it was seen, so that it need not be checked.
    """

    name: str
    exchanges: list[Exchange]
    statements: list[Statement]
    knowledge: Knowledge
    truths: Mapping[str, Truth]
    facts: Mapping[str, str]
    plain: nn.Module
    stated: Normalization | None = None
    seen: bool = False


def _of_app(options: Options, console: Console) -> Source:
    """Run an app, and take what it was seen doing for what is known of its clients."""
    for name in ("--model", "--truth"):
        if name in options.given:
            raise UsageError(f"{name}: an app shows its own; leave it out")
    app = read_app(options.target)
    console.say(f"running {app.name}")
    folder, watch = run_app(
        app,
        options.output / "captures",
        nodes=options.number("--nodes", None),
        rounds=options.number("--rounds", None),
        config=_run_config(options.given.get("--run-config", "")),
    )
    model = watch.require_model()
    shape = next((s.image_shape for s in watch.sessions if s.image_shape is not None), None)
    shape = _shape(options, model) if shape is None or "--image-shape" in options.given else shape
    mean, std = _normalization(options) or guess_normalization([i for s in watch.sessions for i in s.images])
    exchanges = read(folder)
    seen = {session.message: session for session in watch.sessions}
    last: dict[int, Statement] = {}
    statements = []
    knowledge = _knowledge(model, shape, mean, std)
    stated = _stated(options, knowledge)
    for exchange in exchanges:
        session = seen.get(exchange.message)
        if session is not None:
            last[exchange.client] = by_session(session)
        statements.append(_over(last.get(exchange.client, Statement()), stated))
    truths = {m: Truth(*_truth(session, mean, std)) for m, session in seen.items() if len(session.truth[1])}
    size = "×".join(map(str, shape))
    facts = {
        "app": str(options.target),
        "capture": str(folder),
        "model": type(model).__name__,
        "clients train": _told(statements[0]),
        "images": f"{size}, normalised by {told((mean, std))}" if (mean, std) != PLAIN else size,
    }
    return Source(app.name, exchanges, statements, knowledge, truths, facts, model, (mean, std), seen=True)


def _of_captures(options: Options) -> Source:
    """A capture, the model that is named, and what is stated."""
    for name in APP_ONLY:
        if name in options.given:
            raise UsageError(f"{name}: a capture is of a run that is over; leave it out")
    runs = find_runs(options.target)
    if "--model" not in options.given:
        raise UsageError("--model: missing; name the clients' model, --model package.module:Net")
    model = _model(options.given["--model"])
    normalization = _normalization(options)
    mean, std = normalization or PLAIN
    exchanges = read(runs[-1])
    shape = None if "--image-shape" in options.given else known_shape(runs[-1])
    knowledge = _knowledge(model, shape or _shape(options, model), mean, std)
    stated = _stated(options, knowledge) or Statement()
    truths = read_truth(Path(options.given["--truth"])) if "--truth" in options.given else {}
    facts = {
        "capture": str(runs[-1].absolute()) + (f" (the last of {len(runs)} runs there)" if len(runs) > 1 else ""),
        "model": options.given["--model"],
        "clients train": _told(stated) if stated.source else "as the messages say; nothing was stated",
    }
    statements = [stated] * len(exchanges)
    return Source(runs[-1].name, exchanges, statements, knowledge, truths, facts, model, normalization)


def _knowledge(model: nn.Module, shape: tuple[int, int, int], mean: list[float], std: list[float]) -> Knowledge:
    plain = (mean, std) == PLAIN
    return Knowledge(model if plain else normalized(model, mean, std), shape, infer_classes(model, shape))


def _stated(options: Options, knowledge: Knowledge) -> Statement | None:
    text = options.given.get("--client")
    return None if text is None else parse(text, knowledge.model, knowledge.image_shape, knowledge.classes)


def _over(seen: Statement, stated: Statement | None) -> Statement:
    """What was seen, and over it what is stated."""
    if stated is None:
        return seen
    said = {f.name: getattr(stated, f.name) for f in fields(stated) if getattr(stated, f.name) is not None}
    return replace(seen, **said)


def _model(reference: str) -> nn.Module:
    """A model by ``package.module:Net``: a class without arguments, a function that makes one, or one that is made."""
    found = locate(reference.replace(":", "."), "--model")
    try:
        made = found if isinstance(found, nn.Module) else found()
    except Exception as error:
        raise UsageError(
            f"--model={reference}: cannot be made without arguments ({type(error).__name__}: {error}); name a function "
            "that makes it"
        ) from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"--model={reference}: gives a {type(made).__name__}, no torch.nn.Module; name the model")
    return made


def _shape(options: Options, model: nn.Module) -> tuple[int, int, int]:
    text = options.given.get("--image-shape")
    if text is None:
        return infer_shape(model)
    try:
        c, h, w = (int(part) for part in text.lower().replace("x", ",").split(","))
        if min(c, h, w) < 1:
            raise ValueError
    except ValueError:
        raise UsageError(f"--image-shape={text}: is no C,H,W; give three numbers, such as 3,32,32") from None
    return c, h, w


def _normalization(options: Options) -> Normalization | None:
    text = options.given.get("--normalize")
    if text is None:
        return None
    try:
        mean, std = ([float(v) for v in part.split(",")] for part in text.split("/"))
    except ValueError:
        raise UsageError(
            f"--normalize={text}: is no MEAN/STD; give such as 0.5/0.5 or 0.5,0.5,0.5/0.5,0.5,0.5"
        ) from None
    return mean, std


def _run_config(text: str) -> dict[str, Any]:
    """``key=value key='a b'`` as ``flwr run --run-config`` takes it."""
    found: dict[str, Any] = {}
    for word in shlex.split(text):
        key, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--run-config {word}: not an override; write key=value")
        found[key] = _scalar(value)
    return found


def _scalar(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _truth(session: Any, mean: list[float], std: list[float]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(labels, images in [0, 1]) that a client was seen training on."""
    images, labels = session.truth
    if images is None:
        return labels, None
    shift, scale = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    return labels, images * scale + shift


def _told(statement: Statement) -> str:
    """A statement in words."""
    parts = [
        f"{f.name}={getattr(statement, f.name)}"
        for f in fields(statement)
        if f.name != "source" and getattr(statement, f.name) not in (None, False, 0.0)
    ]
    return f"{', '.join(parts) or 'unknown'} ({statement.source or 'nobody says'})"
