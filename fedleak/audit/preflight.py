"""Before any attack: can what was stated of a client be true of the update it sent?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedleak.attacks.base import Knowledge
from fedleak.attacks.labels.last_layer import LastLayer, find_last_layer
from fedleak.audit.checks import CONSISTENT, CONTRADICTS, UNKNOWN, Check, Draft, finish_reading, kept_layers, read_draft
from fedleak.audit.scale import CLIP_KEYS, Claimed, common_norm, find_scale
from fedleak.audit.statement import Statement
from fedleak.audit.wire import Exchange
from fedleak.capture import Observation
from fedleak.training import SGD, LocalTraining, Tensors

SHARE = 0.25
"""Of a federation's updates: where what is stated cannot be true of so many, it is not believed of the others."""


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

    def check(self, name: str) -> str | None:
        """The verdict of the check of that name; None if it was not made."""
        return next((check.verdict for check in self.checks if check.name == name), None)

    @property
    def counts(self) -> tuple[int, ...] | None:
        """The class counts, where the update itself shows that they are right."""
        return self.claimed.counts if self.claimed is not None and self.claimed.error == 0 else None

    @property
    def masked(self) -> bool:
        """Whether the update came masked."""
        return self.exchange.masked


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
        draft = Draft(exchange, statement)
        read_draft(draft, knowledge, layer, earlier)
        drafts.append(draft)
    kept = kept_layers(drafts)
    for draft in drafts:
        finish_reading(draft, layer, kept)
    clip = common_norm(drafts)
    errors: dict[object, float] = {}
    return _shared([_finish(draft, knowledge, layer, clip, errors, seed) for draft in drafts], statements)


def _shared(found: list[Preflight], statements: Sequence[Statement]) -> list[Preflight]:
    """What is stated of a whole federation and cannot be true of a part of it is not to be believed of the rest."""
    stated = [i for i, s in enumerate(statements) if s.source != "seen"]
    for statement in dict.fromkeys(statements[i] for i in stated):
        group = [i for i in stated if statements[i] == statement and found[i].check("scale") is not None]
        against = [i for i in group if found[i].check("scale") == CONTRADICTS]
        if len(against) < max(1, SHARE * len(group)):
            continue
        one = found[against[0]].exchange
        words = f"the same was stated of {len(against)} updates that it cannot be true of, such as node {one.node}'s"
        for i in set(group) - set(against):
            rest = tuple(c for c in found[i].checks if c.name != "scale")
            found[i] = replace(found[i], checks=(*rest, Check("scale", CONTRADICTS, words)))
    return found


def _finish(
    draft: Draft,
    knowledge: Knowledge,
    layer: LastLayer,
    common: float | None,
    errors: dict[object, float],
    seed: int,
) -> Preflight:
    """Clip, scale, and the update to attack."""
    if draft.why is not None or draft.steps is None or draft.steps.contradiction is not None:
        return Preflight(draft.exchange, tuple(draft.checks), why=draft.why, assumed=tuple(draft.assumed))
    assert draft.trace is not None
    training = _training(draft)
    norm = draft.norm()
    told = next((float(draft.exchange.config[k]) for k in CLIP_KEYS if k in draft.exchange.config), None)
    clip = next((c for c in (told, common) if c is not None and abs(norm / c - 1) < 2e-3), None)
    factor, claimed = 1.0, None
    if clip is not None:
        draft.say("clip", CONSISTENT, f"clipped: its norm is {norm:.4g}, as that of others is or as the server asked")
    if draft.trace.kind == "linear" and training.steps is not None:
        factor, claimed = find_scale(draft, knowledge, layer, training, clip, errors, seed)
    elif clip is not None:
        draft.say("scale", UNKNOWN, "a clipped update tells its true size only without noise")
    if training.optimizer is None and training.payload == "weights" and factor != 1.0:
        training = replace(training, optimizer=SGD(1.0))  # the factor was found for this one
    return Preflight(
        draft.exchange,
        tuple(draft.checks),
        _observation(draft, training, factor),
        factor=factor,
        noise=draft.trace.noise if draft.trace.kind == "noise" else None,
        claimed=claimed,
        assumed=tuple(draft.assumed),
    )


def _training(draft: Draft) -> LocalTraining:
    """How the client trained, by what is stated, by the messages, and by its steps."""
    s, steps, told = draft.statement, draft.steps, draft.exchange.lr
    assert steps is not None
    if s.lr and told and abs(s.lr / told - 1) > 1e-6 and s.source != "seen":
        draft.say("lr", CONTRADICTS, f"lr={s.lr:g} was stated, and the messages say {told:g}")
    training = LocalTraining(
        payload="gradient" if draft.payload == "gradient" else "weights",
        batch_size=steps.batch_size,
        local_steps=steps.local_steps,
        epochs=steps.epochs,
        optimizer=s.optimiser(s.lr or told),
        training_mode=not s.eval_mode,
    )
    if training.optimizer is None and draft.payload != "gradient":
        draft.say("lr", UNKNOWN, "the learning rate is stated nowhere")
    return training


def _observation(draft: Draft, training: LocalTraining, factor: float) -> Observation:
    """The update to attack, `factor` times as large as it was sent."""
    change = {n: factor * v for n, v in draft.change.items()}
    as_gradient = training.payload == "gradient"
    return Observation(
        round=draft.exchange.round,
        client=draft.exchange.client,
        parameters=draft.start,
        update={n: -v if as_gradient else draft.start[n] + v for n, v in change.items()},
        training=training,
        start_buffers=draft.buffers,
        buffers={n: v for n, v in draft.returned_buffers.items() if v.is_floating_point()},
    )


def worst(preflights: Sequence[Preflight]) -> Mapping[str, int]:
    """How many of the preflights came to each verdict."""
    found = [p.verdict for p in preflights]
    return {verdict: found.count(verdict) for verdict in (CONSISTENT, CONTRADICTS, UNKNOWN)}
