"""Before any attack: can what was stated of a client be true of the update it sent?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge
from fedleak.attacks.labels.counting import round_counts
from fedleak.attacks.labels.last_layer import LastLayer, find_last_layer
from fedleak.audit.fit import Fitted, fit
from fedleak.audit.lattice import expected_error, find_factor, misfit, path
from fedleak.audit.optimiser import Trace, read_trace
from fedleak.audit.statement import Statement
from fedleak.audit.steps import Steps, reconcile
from fedleak.audit.wire import Exchange
from fedleak.capture import Observation
from fedleak.training import SGD, LocalTraining, Tensors

CONSISTENT, CONTRADICTS, UNKNOWN = "consistent", "contradicts", "unknown"
CLIP_KEYS = ("clipping_norm", "clipping-norm")
"""Under which Flower's strategies tell their clients the norm to clip to."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: its name, a verdict, and why, in words."""

    name: str
    verdict: str
    words: str


@dataclass(frozen=True)
class Claimed:
    """The class counts that a last layer claims, rounded, and how far they may be off, root mean square."""

    counts: tuple[int, ...]
    error: float


@dataclass(frozen=True)
class Preflight:
    """What the checks found of one exchange.

    Attributes:
        exchange: what was checked.
        checks: in order.
        observation: the update to attack, with what is known of its training; None if there is none to attack.
        usable: False where there is nothing to attack; `why` says so.
        why: see `usable`.
        factor: by what the update is multiplied to undo what it was shrunk by.
        noise: standard deviation of noise in the last layer's change, None if none was seen.
        claimed: the class counts that the last layer claims, with error 0 where they are whole numbers.
        assumed: what was taken for granted.
    """

    exchange: Exchange
    checks: tuple[Check, ...]
    observation: Observation | None = None
    why: str | None = None
    factor: float = 1.0
    noise: float | None = None
    claimed: Claimed | None = None
    assumed: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """The worst of the checks: a contradiction, then what is unknown."""
        found = {check.verdict for check in self.checks}
        return CONTRADICTS if CONTRADICTS in found else UNKNOWN if UNKNOWN in found else CONSISTENT

    @property
    def counts(self) -> tuple[int, ...] | None:
        """The class counts, where the update itself shows that they are right."""
        return self.claimed.counts if self.claimed is not None and self.claimed.error == 0 else None

    @property
    def masked(self) -> bool:
        """Whether the update came masked."""
        return self.exchange.masked


@dataclass
class _Draft:
    """A preflight in the making: what is read off one exchange before others are looked at."""

    exchange: Exchange
    statement: Statement
    checks: list[Check] = field(default_factory=list)
    start: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    returned: Tensors = field(default_factory=dict)
    change: Tensors = field(default_factory=dict)
    payload: str = "weights"
    steps: Steps | None = None
    trace: Trace | None = None
    assumed: list[str] = field(default_factory=list)
    why: str | None = None

    def say(self, name: str, verdict: str, words: str) -> None:
        self.checks.append(Check(name, verdict, words))

    def norm(self) -> float:
        return math.sqrt(sum(float(v.double().square().sum()) for v in self.change.values()))


def preflight(
    exchanges: Sequence[Exchange],
    knowledge: Knowledge,
    statements: Sequence[Statement],
    *,
    seed: int = 0,
) -> list[Preflight]:
    """Check each exchange against what is stated of it.

    Args:
        exchanges: N exchanges of one run, by round and client.
        knowledge: the model, its images and classes.
        statements: N statements, one an exchange.
        seed: decides the simulated clients.
    """
    layer = find_last_layer(knowledge)
    earlier: dict[int, Tensors] = {}  # client -> its last reply
    drafts = []
    for exchange, statement in zip(exchanges, statements, strict=True):
        draft = _Draft(exchange, statement)
        _read(draft, knowledge, layer, earlier)
        drafts.append(draft)
    clip = _common_norm(drafts)
    errors: dict[object, float] = {}
    return [_finish(draft, knowledge, layer, clip, errors, seed) for draft in drafts]


def _read(draft: _Draft, knowledge: Knowledge, layer: LastLayer, earlier: dict[int, Tensors]) -> None:
    """Tensors, payload, optimiser and steps of one exchange."""
    exchange, model = draft.exchange, knowledge.model
    if exchange.masked:
        draft.why = "masked: under secure aggregation the server sees sums of several clients, not this update"
        draft.say("masked", CONSISTENT, draft.why)
        return
    if exchange.error is not None:
        draft.why = exchange.error
        return
    sent, reply = fit(exchange.sent, model), fit(exchange.reply, model)
    own = {name: value.detach().float() for name, value in model.named_parameters()}
    draft.start = {name: sent.parameters.get(name, own[name]) for name in own}
    draft.buffers = {n: sent.buffers.get(n, v.detach().clone()) for n, v in model.named_buffers()}
    _tensors(draft, sent, reply, layer)
    if draft.why is None:
        _payload(draft, reply.parameters, layer)
    if draft.why is None:
        kept = [n for n in (draft.statement.keeps or "").split("+") if n in own]
        _kept(draft, reply.parameters, earlier.get(exchange.client), kept)
    if draft.payload == "weights" and draft.why is None:
        earlier[exchange.client] = dict(reply.parameters)
    if draft.why is not None:
        return
    if any(not torch.isfinite(value).all() for value in draft.change.values()):
        draft.why = "holds values that are not finite"
        draft.say("finite", CONTRADICTS, draft.why)
        return
    if not draft.norm() > 0:
        draft.why = "empty: the model came back as it was sent, so that this update tells nothing about its samples"
        draft.say("empty", CONSISTENT, draft.why)
        return
    if not any(float(draft.change[n].abs().max()) > 0 for n in (layer.weight, layer.bias) if n):
        draft.why = "the last layer did not change, and labels are read from it"
        draft.say("tensors", CONSISTENT, draft.why)
        return
    _steps(draft, sent, reply)
    _optimiser(draft, layer, reply.dtypes)


def _tensors(draft: _Draft, sent: Fitted, reply: Fitted, layer: LastLayer) -> None:
    """Which of the model's tensors came."""
    if reply.misshapen:
        draft.why = f"{reply.misshapen[0]} came in another shape than the model's; name the model that clients train"
        draft.say("tensors", CONTRADICTS, draft.why)
        return
    if not reply.parameters:
        draft.why = "the reply's arrays are not this model's; name the model that the clients trained"
        draft.say("tensors", CONTRADICTS, draft.why)
        return
    parts = []
    if reply.missing:
        parts.append(f"{len(reply.missing)} tensors did not come back and count as frozen ({reply.missing[0]}, …)")
    if reply.extra:
        parts.append(f"{len(reply.extra)} arrays belong to no tensor of the model ({reply.extra[0]}, …)")
    if not reply.exact and not reply.extra:
        parts.append("arrays are numbered or renamed, and were put in the model's order")
    if reply.dtypes:
        parts.append(f"sent as {', '.join(reply.dtypes)}")
    if sent.dtypes:
        parts.append(f"received as {', '.join(sent.dtypes)}")
    draft.say("tensors", CONSISTENT, "; ".join(parts) or f"all {len(reply.parameters)} tensors came by name")
    if layer.weight in reply.missing:
        draft.why = f"the last layer ({layer.weight}) is not sent, and labels are read from it"


def _payload(draft: _Draft, returned: Tensors, layer: LastLayer) -> None:
    """Whether new weights came, a change, or a gradient."""
    stated = draft.statement.payload
    start = torch.cat([draft.start[n].flatten() for n in returned]).double()
    value = torch.cat([v.flatten() for v in returned.values()]).double()
    # New weights hold the old ones, whatever was added; a change or a gradient has no reason to.
    held = float(start @ value) / float(start @ start) if float(start @ start) > 0 else 0.0
    looks = "weights" if held > 0.5 else "change"
    draft.payload = stated or looks
    draft.returned = returned
    if float(value.abs().max()) == 0:
        looks = draft.payload
    if stated is None and looks == "change":
        draft.assumed.append("what came is the weights' change")
        draft.say("payload", UNKNOWN, "not new weights: a change of the weights, or a gradient; state which, payload=…")
    elif ((stated or looks) == "weights" and looks != "weights") or (
        stated in ("change", "gradient") and looks == "weights"
    ):
        draft.say("payload", CONTRADICTS, f"{stated} were stated, and what came looks like {looks}")
    else:
        draft.say(
            "payload",
            CONSISTENT,
            {"weights": "new weights", "change": "a change of the weights"}.get(draft.payload, "a gradient"),
        )
    sign = -1 if draft.payload == "gradient" else 1
    draft.change = {
        name: (sign * returned[name] if draft.payload != "weights" else returned[name] - draft.start[name])
        if name in returned
        else torch.zeros_like(draft.start[name])
        for name in draft.start
    }


def _kept(draft: _Draft, returned: Tensors, before: Tensors | None, stated: Sequence[str]) -> None:
    """Tensors that a client starts from as it left them, and not as they were sent."""
    if before is None or draft.payload != "weights":
        return
    names = [n for n in returned if n in before]
    pulls = {n: _pull(draft.change[n], before[n] - draft.start[n]) for n in names}
    known = sorted(p for p in pulls.values() if p is not None)
    usual = known[len(known) // 2] if known else 0.0
    large = {n: p for n, p in pulls.items() if p is not None and returned[n].numel() >= 64}
    moved = {n.rpartition(".")[0] for n, p in large.items() if p - usual > 0.6 and p > 0.8}
    found = list(stated) or [n for n in names if n.rpartition(".")[0] in moved]  # a layer's bias stays with its weight
    for name in found:
        if name in before:
            draft.start[name] = before[name]
            draft.change[name] = returned[name] - before[name]
    if found:
        who = "as stated" if stated else "as the update shows"
        draft.say("state", CONSISTENT, f"the client goes on from its own last {', '.join(found)}, {who}")


def _pull(change: Tensor, way: Tensor) -> float | None:
    """How much of the way back to a client's own last weights its change goes; None where there is no way."""
    size = float(way.double().square().sum())
    return float((change.double() * way.double()).sum()) / size if size > 0 else None


def _steps(draft: _Draft, sent: Fitted, reply: Fitted) -> None:
    """How many steps of how many samples."""
    s, exchange = draft.statement, draft.exchange
    tracked = [n for n in reply.buffers if n.endswith("num_batches_tracked") and n in sent.buffers]
    counted = int(reply.buffers[tracked[0]]) - int(sent.buffers[tracked[0]]) if tracked else None
    if counted is not None and counted <= 0:
        counted = None
    draft.steps = reconcile(
        examples=exchange.examples, batch_size=s.batch_size, steps=s.steps, epochs=s.epochs, counted=counted
    )
    found = draft.steps
    if found.contradiction is not None:
        draft.say("steps", CONTRADICTS, found.contradiction)
        return
    if found.batch_size is None:
        draft.say("steps", UNKNOWN, "neither the reply nor anybody says how many samples there were")
        draft.why = "how many samples are behind the update is unknown; state batch_size and steps"
        return
    words = f"{found.local_steps} steps of {found.batch_size}"
    words += f", {found.epochs} times over" if found.epochs not in (None, 1) else ""
    words += ", counted by BatchNorm" if counted is not None else ""
    if found.assumed:
        draft.assumed.append(found.assumed)
    unknown = found.assumed is not None and s.steps is None and counted is None and s.epochs is None
    draft.say("steps", UNKNOWN if unknown else CONSISTENT, words + (f" (assumed: {found.assumed})" if unknown else ""))


def _optimiser(draft: _Draft, layer: LastLayer, dtypes: Sequence[str]) -> None:
    """Whether the update is what the stated optimiser leaves."""
    steps = draft.steps.local_steps or 1 if draft.steps else 1
    s = draft.statement
    lr = s.lr or draft.exchange.lr
    draft.trace = trace = read_trace(layer, draft.start, draft.change, draft.payload, steps, half="float16" in dtypes)
    stated = s.optimizer or "sgd"
    decay = s.weight_decay or 0.0
    if trace.kind == "change":
        draft.say("optimiser", CONTRADICTS, "what came are no new weights but a change; state payload=change")
    elif trace.kind == "adaptive":
        if stated == "sgd":
            draft.say(
                "optimiser",
                CONTRADICTS,
                f"the last layer's change does not sum to zero over the classes ({trace.sum:.1g}) and its steps are of "
                "one size, as Adam's are: not plain SGD; state the optimiser",
            )
        else:
            draft.say("optimiser", CONSISTENT, f"steps of one size, as {stated} makes them")
    elif trace.kind == "decay" and stated == "sgd":
        total = (lr or 0.0) * steps * ((draft.steps.epochs or 1) if draft.steps else 1)
        want = trace.decay / total if total else None
        if not decay or (want is not None and abs(want / decay - 1) > 0.5):
            how = "" if want is None else f", of about {want:.1g}"
            draft.say("optimiser", CONTRADICTS, f"weight decay was seen{how}; state weight_decay=…")
        else:
            draft.say("optimiser", CONSISTENT, f"SGD with weight decay {decay:g}, as stated")
    elif trace.kind == "noise":
        draft.say("noise", CONSISTENT, f"noise of standard deviation {trace.noise:.2g} in the last layer")
    elif trace.kind == "linear" and stated in ("adam", "adamw") and trace.heavy:
        draft.say("optimiser", CONTRADICTS, f"the change is a sum of gradients, as of SGD, and no step of {stated}")
    elif trace.kind == "linear":
        if s.optimizer is None and s.source != "seen" and not s.lr:
            draft.say(
                "optimiser", UNKNOWN, f"a sum of gradients (classes sum to {trace.sum:.0e}): SGD, of unstated settings"
            )
        else:
            draft.say("optimiser", CONSISTENT, f"a sum of gradients (classes sum to {trace.sum:.0e}), as of {stated}")
    else:
        draft.say(
            "optimiser",
            CONTRADICTS if stated == "sgd" else UNKNOWN,
            f"the last layer's change does not sum to zero over the classes ({trace.sum:.1g}), as it would for the "
            "cross-entropy and SGD",
        )


def _common_norm(drafts: Sequence[_Draft]) -> float | None:
    """The norm that several updates share, as clipped ones do; None if they do not."""
    norms = [d.norm() for d in drafts if d.why is None and d.trace is not None and d.trace.kind in ("linear", "decay")]
    if len(norms) < 2:
        return None
    norms.sort()
    # Two that agree may be chance; clipped ones agree to the rounding of the weights, and are many.
    alike = [[n for n in norms if abs(n / one - 1) < 2e-4] for one in norms]
    most = max(alike, key=len)
    enough = len(most) == len(norms) and most[-1] / most[0] - 1 < 1e-4
    return most[len(most) // 2] if enough or len(most) >= max(3, 0.3 * len(norms)) else None


def _finish(
    draft: _Draft,
    knowledge: Knowledge,
    layer: LastLayer,
    common: float | None,
    errors: dict[object, float],
    seed: int,
) -> Preflight:
    """Clip, scale, and the update to attack."""
    if draft.why is not None or draft.steps is None or draft.steps.contradiction is not None:
        return Preflight(draft.exchange, tuple(draft.checks), why=draft.why, assumed=tuple(draft.assumed))
    s, steps, trace = draft.statement, draft.steps, draft.trace
    assert trace is not None
    lr = s.lr or draft.exchange.lr
    if s.lr and draft.exchange.lr and abs(s.lr / draft.exchange.lr - 1) > 1e-6 and s.source != "seen":
        draft.say("lr", CONTRADICTS, f"lr={s.lr:g} was stated, and the messages say {draft.exchange.lr:g}")
    training = LocalTraining(
        payload="gradient" if draft.payload == "gradient" else "weights",
        batch_size=steps.batch_size,
        local_steps=steps.local_steps,
        epochs=steps.epochs,
        optimizer=s.optimiser(lr),
        training_mode=not s.eval_mode,
    )
    if training.optimizer is None and draft.payload != "gradient":
        draft.say("lr", UNKNOWN, "the learning rate is stated nowhere")
    norm = draft.norm()
    told = next((float(draft.exchange.config[k]) for k in CLIP_KEYS if k in draft.exchange.config), None)
    clip = next((c for c in (told, common) if c is not None and abs(norm / c - 1) < 2e-3), None)
    factor, claimed = 1.0, None
    if clip is not None:
        draft.say("clip", CONSISTENT, f"clipped: its norm is {norm:.4g}, as that of others is or as the server asked")
    if trace.kind == "linear" and training.steps is not None:
        factor, claimed = _scale(draft, knowledge, layer, training, clip, errors, seed)
    elif clip is not None:
        draft.say("scale", UNKNOWN, "a clipped update tells its true size only without noise")
    if training.optimizer is None and training.payload == "weights" and factor != 1.0:
        training = replace(training, optimizer=SGD(1.0))  # the factor was found for this one
    change = {n: factor * v for n, v in draft.change.items()}
    update = (
        {n: -v for n, v in change.items()}
        if training.payload == "gradient"
        else {n: draft.start[n] + v for n, v in change.items()}
    )
    observation = Observation(
        round=draft.exchange.round,
        client=draft.exchange.client,
        parameters=draft.start,
        update=update,
        training=training,
        start_buffers=draft.buffers,
    )
    return Preflight(
        draft.exchange,
        tuple(draft.checks),
        observation,
        factor=factor,
        noise=trace.noise if trace.kind == "noise" else None,
        claimed=claimed,
        assumed=tuple(draft.assumed),
    )


def _scale(
    draft: _Draft,
    knowledge: Knowledge,
    layer: LastLayer,
    training: LocalTraining,
    clip: float | None,
    errors: dict[object, float],
    seed: int,
) -> tuple[float, Claimed | None]:
    """Whether the update's class counts are whole numbers from zero; else what factor makes them so."""
    blind = training.optimizer is None and training.payload == "weights"
    trial = replace(training, optimizer=SGD(1.0)) if blind else training
    found = path(layer, draft.start, draft.change, trial)
    if found is None:
        draft.say("scale", UNKNOWN, "cannot be checked: the last layer has no bias, or the training is not known")
        return 1.0, None
    uneven = getattr(training.optimizer, "momentum", 0.0) and (training.steps or 1) > 1
    if clip is not None or blind:
        factor = None if uneven else find_factor(found)
        if factor is None:
            draft.say("scale", UNKNOWN, "the update was scaled by an unknown factor, and none stands out")
            return 1.0, None
        draft.say("scale", CONSISTENT, f"{factor[0]:.4g} times larger, the update claims whole numbers of samples")
        return factor[0], Claimed(_whole(found.counts(torch.tensor([factor[0]], dtype=torch.float64))[0]), 0.0)
    if draft.payload == "gradient" or training.samples is None:
        trial = replace(training, payload="gradient")
    key = (draft.exchange.round, trial)
    if key not in errors:
        errors[key] = expected_error(layer, knowledge, draft.start, draft.buffers, trial, seed=seed, size=draft.norm())
    doubt = errors[key] + 0.015 * found.samples * found.spread
    claimed = found.counts(torch.ones(1, dtype=torch.float64))
    least, most, off = float(claimed.min()), float(claimed.max()), float(misfit(claimed)[0])
    if least < -max(0.7, 4 * doubt):
        draft.say("scale", CONTRADICTS, f"this would mean {least:.1f} samples of a class: {_blame(training)}")
    elif 0.2 <= doubt < 0.02 * found.samples and found.too_small:
        words = f"the classes would be more even than chance makes them: {_blame(training)}"
        draft.say("scale", CONTRADICTS, f"{words}, unless the client's data are balanced to the sample")
    elif uneven:
        sure = UNKNOWN if doubt > 0.1 * found.samples else CONSISTENT
        draft.say("scale", sure, f"from {least:.0f} to {most:.0f} samples of a class")
    elif doubt < 0.2 and off > 0.2:
        draft.say("scale", CONTRADICTS, f"this would mean fractions of samples ({off:.2f} off): {_blame(training)}")
    elif doubt < 0.2:
        draft.say("scale", CONSISTENT, f"the update holds whole numbers of samples ({off:.2f} off)")
        return 1.0, Claimed(_whole(claimed[0]), 0.0)
    else:
        draft.say("scale", UNKNOWN, "possible, but not told exactly")
    counts = round_counts(claimed, torch.tensor([found.samples]))[0]
    return 1.0, Claimed(tuple(counts.tolist()), math.hypot(0.6 * doubt, found.mixing))  # doubt is on the safe side


def _blame(training: LocalTraining) -> str:
    return (
        "the batch size or the number of steps is wrong"
        if training.payload == "gradient"
        else "the learning rate, the momentum, the batch size or the number of steps is wrong, or the update was scaled"
    )


def _whole(counts: Tensor) -> tuple[int, ...]:
    return tuple(int(c) for c in counts.round().clamp(min=0).tolist())


def worst(preflights: Sequence[Preflight]) -> Mapping[str, int]:
    """How many of the preflights came to each verdict."""
    found = [p.verdict for p in preflights]
    return {verdict: found.count(verdict) for verdict in (CONSISTENT, CONTRADICTS, UNKNOWN)}
