"""What each update gives away: class counts and images, how sure the attacker is of them, and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedleak.attacks import Attack, Run
from fedleak.attacks.base import Knowledge
from fedleak.attacks.inversion import MAP
from fedleak.attacks.labels import Fedleak, Known
from fedleak.attacks.labels.counting import round_counts
from fedleak.attacks.labels.last_layer import find_last_layer
from fedleak.attacks.labels.posterior import domain_images
from fedleak.audit.lattice import reach_of
from fedleak.audit.leaks import Leaks, leaks
from fedleak.audit.leaks import as_json as leaks_json
from fedleak.audit.preflight import CONTRADICTS, UNKNOWN, Preflight
from fedleak.audit.rounds import Reading, combined
from fedleak.capture import Observation
from fedleak.evaluation.matching import assign
from fedleak.evaluation.metrics import label_accuracy, mse
from fedleak.local_update import local_update
from fedleak.seeding import plain_generator
from fedleak.training import SGD, Adam

EXPOSED, PARTLY, NOT_SHOWN, NOT_ATTACKABLE, INCONCLUSIVE = (
    "exposed",
    "partly",
    "not shown",
    "not attackable",
    "inconclusive",
)
MEANING: Mapping[str, str] = {
    EXPOSED: "private labels or images were read from the update, and the attacker knows that they are right",
    PARTLY: "the update says clearly more about the labels than a guess would",
    NOT_SHOWN: "this attacker read no more than a guess; a better one might",
    NOT_ATTACKABLE: "the server does not see this update by itself, or it holds nothing to read",
    INCONCLUSIVE: "what was stated about the clients cannot be true of this update, so that no answer means anything",
}
HARMLESS = ("scale", "normalisation")
"""Checks that may be unknown where labels are sure: the first has its own error, the second moves images alone."""
CLIENTS = 3
"""Simulated clients that show how far the label inference errs."""
LIMITS = 2
"""Updates whose limit is computed."""
MOST_IMAGES = 4
"""Samples up to which images are sought."""


@dataclass(frozen=True)
class Truth:
    """What was really in an update: labels ``[N]``, and images ``[N, C, H, W]`` in [0, 1] where they are known."""

    labels: Tensor
    images: Tensor | None = None


@dataclass(frozen=True)
class Finding:
    """What one update gives away.

    Attributes:
        preflight: what was checked before.
        verdict: one of the five, see `MEANING`.
        words: why.
        counts: samples of each class, as inferred.
        error: how far a count may be off, root mean square; 0 where the counts are whole numbers by the update itself.
        accuracy: the share of labels that the attacker expects to have right.
        guess: the share that a uniform guess would.
        images: ``[N, C, H, W]`` in [0, 1], rebuilt, where they explain the update.
        image_error: the mean squared error of each that the attacker expects.
        label_accuracy, image_mse: the true ones, where the truth is known.
        leaks: what each tensor gives away; None where nothing was attacked.
    """

    preflight: Preflight
    verdict: str
    words: str
    counts: tuple[int, ...] = ()
    error: float = float("nan")
    accuracy: float = float("nan")
    guess: float = float("nan")
    images: Tensor | None = None
    image_error: tuple[float, ...] = ()
    label_accuracy: float | None = None
    image_mse: tuple[float, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)
    leaks: Leaks | None = None

    @property
    def interval(self) -> list[tuple[int, int]]:
        """From how many to how many samples of each class, at about 95%."""
        if not self.counts:
            return []
        reach = 2 * self.error
        total = sum(self.counts)
        return [(max(0, math.floor(c - reach)), min(total, math.ceil(c + reach))) for c in self.counts]


def examine(
    preflights: Sequence[Preflight],
    knowledge: Knowledge,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    seconds: float | None = 60.0,
    truths: Mapping[str, Truth] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[Finding]:
    """Attack each update that can be, and judge what came out of it.

    Args:
        preflights: N updates.
        knowledge: the model, its images and classes.
        seed: decides every draw.
        device: where images are sought.
        seconds: for the images of all updates together; 0 for none.
        truths: message id -> what was really in it, for scores alone.
        on_done: called with the number of updates done.
    """
    errors: dict[object, float] = {}
    findings = []
    for place, preflight in enumerate(preflights):
        try:
            finding = _labels(preflight, knowledge, errors, seed)
        except Exception as problem:  # one update must never stop the others
            words = f"the attack failed: {type(problem).__name__}: {' '.join(str(problem).split())}"
            finding = Finding(preflight, INCONCLUSIVE, words)
        findings.append(finding)
        if on_done is not None:
            on_done(place + 1)
    findings = _over_rounds(findings)
    if seconds is None or seconds > 0:
        findings = _images(findings, knowledge, seed, device, seconds)
    findings = _leaking(findings, knowledge, seed, LIMITS if seconds is None or seconds > 0 else 0)
    return [_scored(f, (truths or {}).get(f.preflight.exchange.message)) for f in findings]


def _labels(preflight: Preflight, knowledge: Knowledge, errors: dict[object, float], seed: int) -> Finding:
    observation = preflight.observation
    if preflight.verdict == CONTRADICTS:
        words = "; ".join(check.words for check in preflight.checks if check.verdict == CONTRADICTS)
        return Finding(preflight, INCONCLUSIVE, f"assumptions violated: {words}")
    if preflight.masked:
        return Finding(preflight, NOT_ATTACKABLE, str(preflight.why))
    if observation is None:
        empty = preflight.why is not None and preflight.why.startswith("empty")
        unknown = any(check.verdict == UNKNOWN for check in preflight.checks)
        verdict = NOT_SHOWN if empty else INCONCLUSIVE if unknown else NOT_ATTACKABLE
        return Finding(preflight, verdict, preflight.why or "there is no update")
    counts, error, noisy = _counts(preflight, observation, knowledge, errors, seed)
    return _read(preflight, tuple(counts), error, -1 if noisy else 1)


def _read(preflight: Preflight, counts: tuple[int, ...], error: float, regressed: int = 1) -> Finding:
    """The finding of class counts that may be off by `error`."""
    total, classes = sum(counts), len(counts)
    accuracy = max(0.0, 1 - 0.4 * error * classes / total)  # E|e| = .8 rms, and each error counts twice
    even = total / classes
    # A regression's counts lie nearer to an even guess than the true ones, by its error; noisy ones further away.
    away = sum((count - even) ** 2 for count in counts) / classes + regressed * error**2
    guess = max(0.0, 1 - 0.4 * max(away, 0.0) ** 0.5 * classes / total)
    return _judge(Finding(preflight, NOT_SHOWN, "", counts, error, accuracy, guess))


def _over_rounds(findings: list[Finding]) -> list[Finding]:
    """What a client tells in several rounds taken together, where these are of the same samples."""
    found = list(findings)
    for client in {f.preflight.exchange.client for f in findings}:
        places = [i for i, f in enumerate(findings) if f.preflight.exchange.client == client and f.error > 0]
        whole = [i for i in places if findings[i].preflight.exchange.examples == sum(findings[i].counts)]
        both = combined([Reading(findings[i].counts, findings[i].error) for i in whole])
        if both is None:
            continue
        for i in whole:
            better = _read(findings[i].preflight, both.counts, both.error, -1)
            note = f"read from the client's {len(whole)} rounds together: they are of the same samples"
            found[i] = replace(better, notes=(*findings[i].notes, note))
    return found


def _counts(
    preflight: Preflight, observation: Observation, knowledge: Knowledge, errors: dict[object, float], seed: int
) -> tuple[list[int], float, bool]:
    """Class counts, how far they may be off (root mean square), and whether that is noise on them, unregressed."""
    rough = preflight.claimed
    if rough is not None and rough.error < 0.06 * sum(rough.counts):
        return list(rough.counts), rough.error, True
    if rough is not None and rough.error > 0.9 * sum(rough.counts) / knowledge.classes:
        # So well trained a model tells of its few doubtful samples only, and nothing tried on made-up images says how
        # far one errs: a guess.
        total, classes = sum(rough.counts), knowledge.classes
        even = [total // classes + (c < total % classes) for c in range(classes)]
        return even, total / classes, False
    if isinstance(observation.training.optimizer, Adam) and observation.training.payload == "weights":
        return *_by_signs(observation, knowledge, seed), False
    followed = _followed(observation)
    counts = _infer(followed, knowledge, seed).bincount(minlength=knowledge.classes).tolist()
    error = _error(followed, preflight, knowledge, errors, seed)
    if rough is not None:
        error = math.hypot(error, 0.7 * rough.error)  # made-up images are not the client's own
    return counts, error, False


def _judge(finding: Finding) -> Finding:
    """The verdict on labels: what the attacker expects to have right, beside what a guess has."""
    # Counts that are mostly noise look skewed, and an even guess then looks worse than it is on a random batch.
    total, classes = sum(finding.counts), len(finding.counts)
    chance = max(0.0, 1 - 0.4 * ((1 - 1 / classes) * classes / max(total, 1)) ** 0.5)
    skill = (finding.accuracy - finding.guess) / max(1 - finding.guess, 1e-9)
    if finding.accuracy < min(chance, 0.9):
        skill = 0.0
    blind = [c for c in finding.preflight.checks if c.verdict == UNKNOWN and c.name not in HARMLESS]
    sure = finding.error == 0 or (
        not blind and (finding.accuracy >= 0.95 or (finding.accuracy >= 0.9 and skill >= 0.8))
    )
    total = sum(finding.counts)
    if sure and total:
        how = "exactly" if finding.error == 0 else f"{finding.accuracy:.0%} of them"
        return replace(finding, verdict=EXPOSED, words=f"the labels of {total} samples can be read, {how}")
    if skill > 0.3:
        why = f", though {blind[0].words}" if blind else ""
        words = f"about {finding.accuracy:.0%} of {total} labels can be read, and {finding.guess:.0%} by a guess{why}"
        return replace(finding, verdict=PARTLY, words=words)
    words = f"about {finding.accuracy:.0%} of {total} labels would be right, and {finding.guess:.0%} by a guess"
    return replace(finding, words=words)


def _followed(observation: Observation) -> Observation:
    """The observation with an optimiser that the label inferences can follow: momentum as a larger learning rate."""
    training = observation.training
    momentum = getattr(training.optimizer, "momentum", None)
    if momentum is None or training.steps is None or training.payload == "gradient":
        return observation
    reach = reach_of(training)
    assert reach is not None
    return replace(observation, training=replace(training, optimizer=SGD(reach / training.steps)))


def _by_signs(observation: Observation, knowledge: Knowledge, seed: int) -> tuple[list[int], float]:
    """Counts where steps are of one size, as Adam's: which classes were more than the model expected, and no more.

    How many that means is the mean over random batches with as many such classes.
    """
    layer = find_last_layer(knowledge)
    samples, classes = observation.training.samples or 1, layer.classes
    name = layer.bias or layer.weight
    moved = (observation.update[name] - observation.parameters[name]).reshape(classes, -1).sum(dim=1)
    more = moved > 0
    generator = plain_generator(seed)
    drawn = torch.randint(classes, (4000, samples), generator=generator)
    batches = torch.nn.functional.one_hot(drawn, classes).sum(dim=1).double() if samples < 500 else None
    if batches is None:
        return torch.full((classes,), samples // classes).tolist(), samples / classes
    above = batches > samples / classes
    alike = above.sum(dim=1) == more.sum()
    batches, above = batches[alike], above[alike]
    if len(batches) < 10:
        return [samples // classes] * classes, samples / classes
    high = batches[above].mean() if bool(above.any()) else torch.tensor(0.0)
    low = batches[~above].mean() if not bool(above.all()) else torch.tensor(0.0)
    guess = torch.where(more, high, low)
    error = float((batches - torch.where(above, high, low)).square().mean().sqrt())
    counts = round_counts((guess / guess.sum() * samples)[None], torch.tensor([samples]))[0]
    return counts.tolist(), error


def _infer(observation: Observation, knowledge: Knowledge, seed: int) -> Tensor:
    [guess] = Fedleak().infer([observation], knowledge, Run(seed=seed))
    assert guess is not None
    return guess.best


def _error(
    followed: Observation, preflight: Preflight, knowledge: Knowledge, errors: dict[object, float], seed: int
) -> float:
    """Root mean square error of the counts, on simulated clients with made-up images, noise and all."""
    assert preflight.observation is not None
    training = preflight.observation.training
    key = (followed.round, training, preflight.noise is not None)
    if key in errors:
        return errors[key]
    samples = training.samples or 1
    simulated = training if training.optimizer is not None or training.payload == "gradient" else None
    if simulated is None:
        return errors.setdefault(key, samples / knowledge.classes**0.5)
    generator = plain_generator(seed)
    few = min(samples, 64)
    images = domain_images(knowledge, CLIENTS, few, seed)
    squares = []
    for client in range(CLIENTS):
        own = images[client * few : (client + 1) * few][torch.arange(samples) % few]
        shares = torch.rand(knowledge.classes, generator=generator) + 0.05
        labels = torch.multinomial(shares, samples, replacement=True, generator=generator)
        sent = local_update(
            knowledge.model, followed.parameters, dict(followed.start_buffers), own, labels, simulated
        ).update
        if preflight.noise is not None:
            sent = {n: v + preflight.noise * torch.randn(v.shape, generator=generator) for n, v in sent.items()}
        inferred = _infer(replace(followed, update=sent), knowledge, seed + client)
        off = inferred.bincount(minlength=knowledge.classes) - labels.bincount(minlength=knowledge.classes)
        squares.append(float(off.double().square().mean()))
    return errors.setdefault(key, (sum(squares) / len(squares)) ** 0.5)


def _images(
    findings: list[Finding], knowledge: Knowledge, seed: int, device: torch.device | str, seconds: float | None
) -> list[Finding]:
    """Images of small single steps whose labels are known; kept only where they explain the update."""
    found = list(findings)
    for place, finding in enumerate(findings):
        observation = finding.preflight.observation
        if finding.verdict != EXPOSED or observation is None or not 0 < sum(finding.counts) <= MOST_IMAGES:
            continue
        if not observation.training.single or observation.training.scale is None:
            continue
        labels = torch.arange(knowledge.classes).repeat_interleave(torch.tensor(finding.counts))
        told = replace(observation, labels=labels)
        granted = replace(knowledge, threat=replace(knowledge.threat, labels=True))
        try:
            [result] = Attack(Known(), MAP(), name="audit")([told], granted, device=device, seed=seed, seconds=seconds)
        except Exception as problem:
            found[place] = replace(finding, notes=(*finding.notes, f"no images: {' '.join(str(problem).split())}"))
            continue
        if not result.converged:
            continue
        error = tuple(float(e) for e in result.details.get("expected_mse", ()))
        words = f"{finding.words}; {len(result.images)} private images were rebuilt and explain the update"
        found[place] = replace(finding, images=result.images, image_error=error, words=words)
    return found


def _leaking(findings: list[Finding], knowledge: Knowledge, seed: int, limits: int) -> list[Finding]:
    """With what each tensor gives away; the limit for a few, those with images first."""
    order = sorted(range(len(findings)), key=lambda i: findings[i].images is None)
    found = list(findings)
    for place in order:
        f = findings[place]
        if not f.counts:
            continue
        try:
            told = leaks(f.preflight, knowledge, f.counts, f.error, f.images, seed=seed, limited=limits > 0)
        except Exception as problem:  # a listing must never cost the verdict
            note = f"no listing of tensors: {' '.join(str(problem).split())}"
            found[place] = replace(f, notes=(*f.notes, note))
            continue
        limits -= told is not None and told.image_bits is not None
        found[place] = replace(f, leaks=told)
    return found


def _scored(finding: Finding, truth: Truth | None) -> Finding:
    """With the scores, where the truth is known."""
    if truth is None or not finding.counts or not len(truth.labels):
        return finding
    inferred = torch.arange(len(finding.counts)).repeat_interleave(torch.tensor(finding.counts))
    finding = replace(finding, label_accuracy=label_accuracy(truth.labels, inferred))
    if finding.images is not None and truth.images is not None and finding.images.shape == truth.images.shape:
        order = assign(truth.images, finding.images)
        errors = mse(truth.images, finding.images[order])
        finding = replace(finding, image_mse=tuple(float(e) for e in errors))
    return finding


def overall(findings: Sequence[Finding]) -> str:
    """One verdict on a federation: its worst update's."""
    found = {finding.verdict for finding in findings}
    order = (EXPOSED, PARTLY, INCONCLUSIVE, NOT_SHOWN, NOT_ATTACKABLE)
    return next((verdict for verdict in order if verdict in found), INCONCLUSIVE)


def as_json(finding: Finding) -> dict[str, Any]:
    """A finding for `audit.json`."""
    exchange, preflight = finding.preflight.exchange, finding.preflight
    return {
        "round": exchange.round,
        "node": exchange.node,
        "client": exchange.client,
        "verdict": finding.verdict,
        "why": finding.words,
        "preflight": {
            "verdict": preflight.verdict,
            "checks": [{"name": c.name, "verdict": c.verdict, "words": c.words} for c in preflight.checks],
            "factor": preflight.factor,
            "noise": preflight.noise,
            "assumed": list(preflight.assumed),
        },
        "labels": {
            "counts": list(finding.counts),
            "interval": [list(pair) for pair in finding.interval],
            "expected_accuracy": _number(finding.accuracy),
            "guess": _number(finding.guess),
            "accuracy": finding.label_accuracy,
        },
        "images": {
            "rebuilt": 0 if finding.images is None else len(finding.images),
            "expected_mse": list(finding.image_error),
            "mse": list(finding.image_mse),
        },
        **leaks_json(finding.leaks),
        "clear": {name: dict(record) for name, record in exchange.clear.items()},
        "notes": list(finding.notes),
    }


def _number(value: float) -> float | None:
    return None if value != value else round(value, 4)
