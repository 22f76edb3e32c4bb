"""fedleak's own label inference: row-space matching for small batches, simulation for large ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from fedleak.attacks.base import Knowledge, LabelGuess, LabelInference, Run
from fedleak.attacks.labels.bias import Bias
from fedleak.attacks.labels.counting import Counts, Evidence, collect, guesses_from, round_counts
from fedleak.attacks.labels.defended import Defended
from fedleak.attacks.labels.idlg import sign_rule
from fedleak.attacks.labels.ilrg import ILRG
from fedleak.attacks.labels.last_layer import LastLayer, LastLayerInference
from fedleak.attacks.labels.llg import LLG
from fedleak.attacks.labels.local_steps import as_plain, local_step_counts
from fedleak.attacks.labels.posterior import Posterior, domain_images, inputs, label_posterior
from fedleak.attacks.labels.probe import auxiliary_images, probe
from fedleak.attacks.labels.reader import read_shares
from fedleak.attacks.labels.version1 import version1
from fedleak.attacks.row_space import Found, imagined_atoms, project_features, row_space, search
from fedleak.capture import Observation
from fedleak.threads import one_thread
from fedleak.training import SGD, LocalTraining

EXACT = 1e-6
"""Residual of the row space up to which the features that it found are those of the samples."""


class Fedleak(LastLayerInference):
    """The default for batches: exact where the gradient's row space holds every sample, else learnt by simulation.

    Needs `batch_size`; uses auxiliary data where they are granted.

    - One sample: iDLG's sign rule.
    - Batches below the number of classes and up to `largest`, one local step: `fedleak.attacks.row_space.search`,
      which finds labels and features together and so also works on trained models. It is left out where simulation is
      already sure of the counts, and not believed where its residual stays high (noise, pruning).
    - Larger batches: counts by `label_posterior`.
    - Where that is unsure, as in trained models: a network trained on simulated batches, `read_shares`.
    - Several local steps: counts by `local_step_counts`, some ten seconds an update.
    - Unknown scale (new weights without a learning rate): version 1, which needs none.

    Args:
        largest: batch size up to which to search: one step of it costs B⁶.
        starts: starting batches of the search.
        rounds: rounds of label changes of the search.
        atoms: imagined atoms of the search.
        believed: residual up to which the search is believed.
        doubt: error of the counts, in labels, above which they are read again by a network (`read_shares`).
        device: where the search computes, in float64; None for where the attack does.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    def __init__(
        self,
        *,
        largest: int = 12,
        starts: int = 256,
        rounds: int = 6,
        atoms: int = 2000,
        believed: float = 0.05,
        doubt: float = 0.3,
        device: str | None = None,
    ) -> None:
        self.largest = largest
        self.starts = starts
        self.rounds = rounds
        self.atoms = atoms
        self.believed = believed
        self.doubt = doubt
        self.device = device

    def adapted(self) -> LabelInference:
        """With another method for batches' updates that have gaps."""
        return Defended(self)

    def read(
        self, observations: Sequence[Observation], layer: LastLayer, knowledge: Knowledge, run: Run, candidates: int
    ) -> list[LabelGuess]:
        """See `LastLayerInference.read`; a batch size is needed."""
        evidence = replace(collect([as_plain(o) for o in observations], layer), observations=observations)
        with one_thread():  # the search takes thousands of tiny steps
            return self._guess(evidence, knowledge, candidates, run)

    def _guess(self, evidence: Evidence, knowledge: Knowledge, candidates: int, run: Run) -> list[LabelGuess]:
        """The guess of each of N updates, by whichever way fits it."""
        single = evidence.totals == 1
        blind = torch.tensor([as_plain(o).scale is None for o in evidence.observations]) & ~single
        guesses: dict[int, LabelGuess] = {}
        for where, how in ((single, _one_label), (blind, _without_scale)):
            places = where.nonzero()[:, 0].tolist()
            if places:
                guesses |= dict(zip(places, guesses_from(how(_part(evidence, places)), candidates), strict=True))
        rest = (~single & ~blind).nonzero()[:, 0].tolist()
        if rest:
            some = _part(evidence, rest)
            posterior = _posterior(some, knowledge, run)
            found = self._search(some, posterior, knowledge, run)
            posterior = self._doubtful(some, posterior, set(found), knowledge, run.seed)
            for k, (place, guess) in enumerate(zip(rest, guesses_from(posterior.counts, candidates), strict=True)):
                guesses[place] = _merge(found[k], guess, candidates, evidence.layer) if k in found else guess
        return [guesses[place] for place in range(len(evidence.totals))]

    def _doubtful(
        self, evidence: Evidence, posterior: Posterior, done: set[int], knowledge: Knowledge, seed: int
    ) -> Posterior:
        """Read again, at greater cost, what simulation is unsure of and the search has not found."""
        once = [not _simulated(observation.training) for observation in evidence.observations]
        places = [n for n, spread in enumerate(posterior.spread.tolist()) if spread > self.doubt and once[n]]
        places = [n for n in places if n not in done]
        if not places or evidence.layer.classes > 20:
            return posterior
        expected = posterior.counts.expected.clone()
        shares = read_shares(_part(evidence, places), knowledge, seed=seed)
        expected[places] = evidence.totals[places, None] * shares
        return Posterior(Counts(round_counts(expected, evidence.totals), expected), posterior.spread)

    def _search(self, evidence: Evidence, posterior: Posterior, knowledge: Knowledge, run: Run) -> dict[int, Found]:
        """What row-space matching found, for the updates it applies to and is believed for."""
        layer = evidence.layer
        most = layer.classes - (1 if layer.bias else 2)
        gap = (posterior.counts.expected - posterior.counts.counts).abs().amax(dim=1)
        unsure = (0.5 - gap) < 6 * posterior.spread
        small = (evidence.totals <= min(most, layer.features, self.largest)) & unsure
        once = torch.tensor([not _simulated(observation.training) for observation in evidence.observations])
        believed: dict[int, Found] = {}
        for size in evidence.totals[small & once].unique().tolist():
            places = (small & once & (evidence.totals == size)).nonzero()[:, 0].tolist()
            few = max(1, min(4, 2**30 // (8 * 3 * 2 * self.atoms * layer.classes * size)))  # at a time: memory
            for start in range(0, len(places), few):
                group = places[start : start + few]
                searched = search_row_space(
                    _part(evidence, group),
                    knowledge,
                    run,
                    starts=self.starts,
                    rounds=self.rounds,
                    atoms=self.atoms,
                    device=self.device,
                )
                for place, found in zip(group, searched, strict=True):
                    if float(found.residual[0]) < self.believed:
                        believed[place] = found
        return believed


def search_row_space(
    evidence: Evidence,
    knowledge: Knowledge,
    run: Run,
    *,
    starts: int = 256,
    rounds: int = 6,
    atoms: int = 2000,
    device: str | None = None,
) -> list[Found]:
    """Labels and features by row-space matching, of updates with the same batch size B < C.

    Args:
        evidence: N updates.
        knowledge: auxiliary images of which become atoms.
        run: its device and seed.
        starts, rounds, atoms, device: see `Fedleak`.
    """
    layer, held = evidence.layer, [observation.parameters for observation in evidence.observations]
    where, seed = device or run.device, run.seed
    head = torch.stack([parameters[layer.weight] for parameters in held]).double().to(where)
    shift = torch.stack([parameters[layer.bias] for parameters in held]).double().to(where) if layer.bias else None
    bias = evidence.bias.to(where) if evidence.bias is not None else None
    space = row_space(evidence.weight.to(where), bias, head, shift, int(evidence.totals[0]))

    images = domain_images(knowledge, 8, 4, seed)
    labels = None
    if knowledge.auxiliary is not None:
        images, labels = auxiliary_images(knowledge, max(2, 1000 // layer.classes), seed, "fedleak")
    found = probe(evidence.observations, layer, knowledge, images)
    features = found.features[found.which].double().to(where)
    logits = features @ head.transpose(1, 2)
    if shift is not None:
        logits = logits + shift[:, None]
        features = torch.cat([features, torch.ones_like(features[..., :1])], dim=2)
    real = project_features(space, features, logits)
    imagined, atom_labels = imagined_atoms(space, real.mean(dim=1), atoms, seed)
    if labels is not None:
        atom_labels, order = torch.cat([atom_labels, labels.to(where)]).sort(stable=True)
        imagined = torch.cat([imagined, real], dim=1)[:, order]
    return search(
        space,
        imagined,
        atom_labels,
        seed=seed,
        starts=starts,
        rounds=rounds,
        noise=torch.tensor([_rounding(observation, layer.weight) for observation in evidence.observations]),
    )


def _part(evidence: Evidence, places: list[int]) -> Evidence:
    """Some of the updates."""
    return Evidence(
        [evidence.observations[place] for place in places],
        evidence.layer,
        evidence.weight[places],
        None if evidence.bias is None else evidence.bias[places],
        evidence.totals[places],
    )


def _one_label(evidence: Evidence) -> Counts:
    labels = sign_rule(evidence.weight)
    counts = torch.nn.functional.one_hot(labels, evidence.layer.classes)
    return Counts(counts, -evidence.sums / evidence.sums.abs().amax(dim=1, keepdim=True))


def _without_scale(evidence: Evidence) -> Counts:
    return version1(evidence.sums, evidence.totals)


def _posterior(evidence: Evidence, knowledge: Knowledge, run: Run) -> Posterior:
    """Counts by simulation of a batch, or of the local steps; by iLRG where there are too many classes to simulate."""
    if evidence.layer.classes > 200:
        counts = ILRG().count(evidence, knowledge, run)
        return Posterior(counts, torch.full((len(counts.counts),), torch.inf, dtype=torch.float64))
    several = torch.tensor([_simulated(o.training) for o in evidence.observations])
    expected = torch.zeros(evidence.sums.shape, dtype=torch.float64)
    spread = torch.zeros(len(expected), dtype=torch.float64)
    if not several.all():
        once = (~several).nonzero()[:, 0].tolist()
        found = label_posterior(_part(evidence, once), knowledge, seed=run.seed)
        expected[once], spread[once] = found.counts.expected, found.spread
    if several.any():
        images, pool = inputs(knowledge, run.seed, per_class=80)
        places = several.nonzero()[:, 0].tolist()
        some = _part(evidence, places)
        some = replace(some, observations=[as_plain(o) for o in some.observations])
        others = [method.count(some, knowledge, run).counts for method in (LLG(), Bias(), ILRG())]
        rough = torch.stack([_without_scale(some).counts, *others], dim=1) / some.totals[:, None, None]
        for place, n in enumerate(places):
            bias = evidence.bias[n] if evidence.bias is not None else None
            expected[n], spread[n] = local_step_counts(
                evidence.observations[n],
                evidence.weight[n],
                bias,
                evidence.layer,
                knowledge,
                images,
                pool,
                rough[place],
                seed=run.seed,
            )
    return Posterior(Counts(round_counts(expected, evidence.totals), expected), spread)


def _simulated(training: LocalTraining) -> bool:
    """Whether `local_step_counts` has to follow the client, and can: more than one known step along one gradient."""
    optimizer = training.optimizer
    along = isinstance(optimizer, SGD) and not optimizer.weight_decay
    return optimizer is not None and not (training.single and along)


def _rounding(observation: Observation, name: str) -> float:
    """Standard deviation of a gradient's entry that was recovered from the difference of two rounded weights."""
    scale = as_plain(observation).scale
    if observation.training.payload == "gradient" or not scale:
        return 0.0
    weights = observation.parameters[name]
    step = torch.finfo(weights.dtype).eps / 4
    return float(step * weights.double().square().mean().sqrt() / scale)


def _merge(found: Found, guess: LabelGuess, candidates: int, layer: LastLayer) -> LabelGuess:
    """The search's multisets by residual, with the features of the first; then those of `guess` not among them."""
    batch = found.labels.shape[1]
    labels = found.labels[:candidates].cpu()
    freedom = max(1, layer.classes * batch - batch**2)
    residual = found.residual[: len(labels)].clamp(min=1e-300)
    weights = (residual[0] / residual) ** (freedom / 2)
    others = [row for row in guess.labels if not (labels == row).all(dim=1).any()][: candidates - len(labels)]
    if others:
        labels = torch.cat([labels, torch.stack(others)])
        weights = torch.cat([weights, weights[-1:].expand(len(others)) / 2])
    exact = float(found.residual[0]) < EXACT
    features = found.features[0, :, : layer.features].cpu() if exact else None
    return LabelGuess(labels, (weights / weights.sum()).float(), features)
