"""What is read off one update by itself: its tensors, payload, steps and optimiser, beside what was stated of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedleak.attacks.base import Knowledge
from fedleak.attacks.labels.last_layer import LastLayer
from fedleak.audit.fit import Fitted, fit
from fedleak.audit.optimiser import Trace, read_trace
from fedleak.audit.statement import Statement
from fedleak.audit.steps import Steps, reconcile
from fedleak.audit.wire import Exchange
from fedleak.training import Tensors

CONSISTENT, CONTRADICTS, UNKNOWN = "consistent", "contradicts", "unknown"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: its name, a verdict, and why, in words."""

    name: str
    verdict: str
    words: str


@dataclass
class Draft:
    """A preflight in the making: what is read off one exchange before others are looked at."""

    exchange: Exchange
    statement: Statement
    checks: list[Check] = field(default_factory=list)
    start: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    returned: Tensors = field(default_factory=dict)
    returned_buffers: Tensors = field(default_factory=dict)
    before: Tensors | None = None
    kinds: tuple[str, ...] = ()
    steps_counted: int | None = None
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


def read_draft(draft: Draft, knowledge: Knowledge, layer: LastLayer, earlier: dict[int, Tensors]) -> None:
    """Tensors and payload of one exchange, and what the client seems to have kept from its last one, if any.

    Args:
        draft: of the exchange; those of a client come in the order of its rounds.
        knowledge: the model, its images and classes.
        layer: the model's last layer.
        earlier: client -> its last reply, kept up to date here.
    """
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
    draft.returned_buffers, draft.kinds = reply.buffers, reply.dtypes
    _tensors(draft, sent, reply, layer)
    if draft.why is None:
        _payload(draft, reply.parameters, layer)
    if draft.payload == "weights" and draft.why is None:
        draft.before = earlier.get(exchange.client)
        earlier[exchange.client] = dict(reply.parameters)
    draft.steps_counted = _counted(sent, reply)


def finish_reading(draft: Draft, layer: LastLayer, kept: set[str]) -> None:
    """Steps and optimiser of one exchange, once it is known which of its tensors its client goes on from.

    Args:
        draft: as `read_draft` left it.
        layer: the model's last layer.
        kept: layers that the federation's clients keep, by their updates.
    """
    if draft.why is not None:
        return
    _kept(draft, kept)
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
    _steps(draft)
    _optimiser(draft, layer, draft.kinds)


def _tensors(draft: Draft, sent: Fitted, reply: Fitted, layer: LastLayer) -> None:
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


def _payload(draft: Draft, returned: Tensors, layer: LastLayer) -> None:
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


def kept_layers(drafts: Sequence[Draft]) -> set[str]:
    """Layers that most clients start from as they left them, and not as they were sent: an app keeps one in all."""
    votes: list[set[str]] = []
    for draft in drafts:
        if draft.before is None or draft.why is not None:
            continue
        pulls = {n: _pull(draft.change[n], v - draft.start[n]) for n, v in draft.before.items() if n in draft.returned}
        known = sorted(p for p in pulls.values() if p is not None)
        usual = known[len(known) // 2] if known else 0.0
        large = {n: p for n, p in pulls.items() if p is not None and draft.returned[n].numel() >= 64}
        votes.append({n.rpartition(".")[0] for n, p in large.items() if p - usual > 0.6 and p > 0.8})
    return {layer for vote in votes for layer in vote if 2 * sum(layer in other for other in votes) > len(votes)}


def _kept(draft: Draft, layers: set[str]) -> None:
    """Take the start of what a client keeps from its own last reply."""
    if draft.before is None:
        return
    stated = [n for n in (draft.statement.keeps or "").split("+") if n in draft.start]
    seen = draft.statement.source == "seen"  # then nothing is kept that was not seen to be
    names = [n for n in draft.returned if n in draft.before]
    found = stated or [n for n in names if not seen and n.rpartition(".")[0] in layers]  # a bias stays with its weight
    for name in found:
        if name in draft.before:
            draft.start[name] = draft.before[name]
            draft.change[name] = draft.returned[name] - draft.before[name]
    if found:
        who = "as stated" if stated else "as the updates show"
        draft.say("state", CONSISTENT, f"the client goes on from its own last {', '.join(found)}, {who}")


def _pull(change: Tensor, way: Tensor) -> float | None:
    """How much of the way back to a client's own last weights its change goes; None where there is no way."""
    size = float(way.double().square().sum())
    return float((change.double() * way.double()).sum()) / size if size > 0 else None


def _counted(sent: Fitted, reply: Fitted) -> int | None:
    """Steps by BatchNorm's own count; None where it does not say."""
    tracked = [n for n in reply.buffers if n.endswith("num_batches_tracked") and n in sent.buffers]
    counted = int(reply.buffers[tracked[0]]) - int(sent.buffers[tracked[0]]) if tracked else 0
    return counted if counted > 0 else None


def _steps(draft: Draft) -> None:
    """How many steps of how many samples."""
    s, exchange, counted = draft.statement, draft.exchange, draft.steps_counted
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
    words = f"{found.local_steps} step{'' if found.local_steps == 1 else 's'} of {found.batch_size}"
    words += f", {found.epochs} times over" if found.epochs not in (None, 1) else ""
    words += ", counted by BatchNorm" if counted is not None else ""
    if found.assumed:
        draft.assumed.append(found.assumed)
    unknown = found.assumed is not None and s.steps is None and counted is None and s.epochs is None
    draft.say("steps", UNKNOWN if unknown else CONSISTENT, words + (f" (assumed: {found.assumed})" if unknown else ""))


def _optimiser(draft: Draft, layer: LastLayer, dtypes: Sequence[str]) -> None:
    """Whether the update is what the stated optimiser leaves."""
    steps = draft.steps.local_steps or 1 if draft.steps else 1
    draft.trace = trace = read_trace(layer, draft.start, draft.change, draft.payload, steps, half="float16" in dtypes)
    if trace.kind == "noise":
        draft.say("noise", CONSISTENT, f"noise of standard deviation {trace.noise:.2g} in the last layer")
    elif trace.kind == "linear":
        draft.say("optimiser", *_of_sum(draft.statement, trace))
    elif trace.kind == "decay" and (draft.statement.optimizer or "sgd") == "sgd":
        total = steps * ((draft.steps.epochs or 1) if draft.steps else 1)
        draft.say("optimiser", *_of_decay(draft, trace, total))
    else:
        draft.say("optimiser", *_of_other(draft.statement, trace))


def _of_sum(stated: Statement, trace: Trace) -> tuple[str, str]:
    """Verdict and words on a change that is a sum of gradients."""
    how = f"a sum of gradients (classes sum to {trace.sum:.0e})"
    if stated.optimizer in ("adam", "adamw") and trace.heavy:
        return CONTRADICTS, f"the change is a sum of gradients, as of SGD, and no step of {stated.optimizer}"
    if stated.optimizer is None and stated.source != "seen" and not stated.lr:
        return UNKNOWN, f"{how}: SGD, of unstated settings"
    return CONSISTENT, f"{how}, as of {stated.optimizer or 'sgd'}"


def _of_decay(draft: Draft, trace: Trace, steps: int) -> tuple[str, str]:
    """Verdict and words on a change with weight decay in it."""
    total = (draft.statement.lr or draft.exchange.lr or 0.0) * steps
    want, decay = trace.decay / total if total else None, draft.statement.weight_decay
    if not decay or (want is not None and abs(want / decay - 1) > 0.5):
        how = "" if want is None else f", of about {want:.1g}"
        return CONTRADICTS, f"weight decay was seen{how}; state weight_decay=…"
    return CONSISTENT, f"SGD with weight decay {decay:g}, as stated"


def _of_other(stated: Statement, trace: Trace) -> tuple[str, str]:
    """Verdict and words on a change that SGD on the cross-entropy does not leave."""
    name = stated.optimizer or "sgd"
    off = f"the last layer's change does not sum to zero over the classes ({trace.sum:.1g})"
    if trace.kind == "change":
        return CONTRADICTS, "what came are no new weights but a change; state payload=change"
    if trace.kind == "adaptive" and name != "sgd":
        return CONSISTENT, f"steps of one size, as {name} makes them"
    if trace.kind == "adaptive":
        words = f"{off} and its steps are of one size, as Adam's are: not plain SGD; state the optimiser"
        return CONTRADICTS, words
    return CONTRADICTS if name == "sgd" else UNKNOWN, f"{off}, as it would for the cross-entropy and SGD"
