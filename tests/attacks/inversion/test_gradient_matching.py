"""Gradient matching: many problems together give what each gives alone, and every end has its reason."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedleak.attacks.base import LabelGuess, Run
from fedleak.attacks.inversion import (
    L2,
    LBFGS,
    Adam,
    Cosine,
    GradientMatching,
    Optimizer,
    SmoothTotalVariation,
    TotalVariation,
)
from fedleak.attacks.inversion.distances import ChainDistance
from fedleak.attacks.inversion.starts import first_point
from fedleak.attacks.inversion.trace import MOST_SNAPSHOTS
from fedleak.attacks.problem import pose
from fedleak.attacks.results import Progress, Reconstruction
from fedleak.errors import UsageError
from fedleak.local_update import local_update
from fedleak.training import SGD, LocalTraining


def errors(results: list[Reconstruction], truth: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each image [N, B]; batches here are small and in order of labels."""
    return torch.stack([(r.images - t).square().flatten(1).mean(1) for r, t in zip(results, truth, strict=True)])


def same(left: list[Reconstruction], right: list[Reconstruction], atol: float = 1e-5) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a.images, b.images, rtol=0, atol=atol)
        assert torch.equal(a.labels, b.labels)
        assert (a.stop_reason, a.restarts) == (b.stop_reason, b.restarts)
        assert abs(a.evaluations - b.evaluations) <= 2


PER_SAMPLE = LocalTraining("gradient", 3, 1, per_sample=True)


def first_images(config: GradientMatching, v, observation, restart: int) -> Tensor:
    """What a restart of an observation begins with."""
    (problem,) = pose([observation], v.guesses[:1], v.knowledge)
    return first_point(config.settings.start, problem, restart, v.knowledge.image_shape, v.knowledge.classes, 0)[0]


SHORT: dict[str, Any] = {"dtype": "float64", "max_evaluations": 30, "restarts": 1}


def test_images_come_back(victims) -> None:
    v = victims(6)
    results = GradientMatching(tolerance=1e-8).invert(v.observations, v.guesses, v.knowledge, Run())
    assert [r.stop_reason for r in results] == ["converged"] * 6
    assert errors(results, v.images).max() < 1e-3
    assert all(r.images.dtype == torch.float32 and r.images.min() >= 0 and r.images.max() <= 1 for r in results)
    assert all(r.objective <= 1e-8 and r.evaluations > 10 and r.seconds > 0 for r in results)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_together_as_alone_and_in_chunks(victims, batch: int, shared: bool) -> None:
    v = victims(5, batch=batch, shared=shared, dtype=torch.float64)
    together = GradientMatching(**SHORT).invert(v.observations, v.guesses, v.knowledge, Run())
    alone = [
        GradientMatching(**SHORT).invert([o], [g], v.knowledge, Run())[0]
        for o, g in zip(v.observations, v.guesses, strict=True)
    ]
    same(together, alone, atol=1e-6)
    same(
        together,
        GradientMatching(chunk_size=2, **SHORT).invert(v.observations, v.guesses, v.knowledge, Run()),
        atol=1e-6,
    )
    assert len({r.objective for r in together}) == 5  # five problems, not five times one


def test_fast_and_general_path_agree(victims) -> None:
    v = victims(3, batch=2, dtype=torch.float64)
    fast = GradientMatching(**SHORT).invert(v.observations, v.guesses, v.knowledge, Run())
    same(fast, GradientMatching(general=True, **SHORT).invert(v.observations, v.guesses, v.knowledge, Run()))


def test_recommended_settings_need_fewer_evaluations(victims) -> None:
    """Smooth images from grey by cosines; normal noise by pixels."""
    v = victims(4, shape=(3, 16, 16))
    waves = torch.linspace(0, 3, 16)
    for i in range(4):
        pattern = 0.5 + 0.4 * torch.sin(waves[:, None] * (i + 1) / 2 + waves[None] + torch.arange(3)[:, None, None])
        v.images[i, 0] = pattern
    v = type(v)(4, shape=(3, 16, 16), images=v.images)
    config: dict[str, Any] = {"objective": L2(relative=True), "restarts": 1, "tolerance": 1e-5}
    quick = GradientMatching(start="grey", smoothness=1.0, optimizer=LBFGS(max_step=0.5), **config)
    results = quick.invert(v.observations, v.guesses, v.knowledge, Run())
    papers = GradientMatching(**config).invert(v.observations, v.guesses, v.knowledge, Run())
    assert all(r.stop_reason == "converged" for r in results)
    assert errors(results, v.images).max() < 1e-3
    assert sum(r.evaluations for r in results) < 0.5 * sum(r.evaluations for r in papers)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("general", [False, True])
def test_a_broken_problem_changes_no_other(victims, poison: float, general: bool) -> None:
    v = victims(4, dtype=torch.float64)
    config = GradientMatching(max_evaluations=30, restarts=2, dtype="float64", general=general)
    clean = config.invert(v.observations, v.guesses, v.knowledge, Run())
    update = {name: value.clone() for name, value in v.observations[1].update.items()}
    update["fc.weight"][0, 0] = poison
    observations = list(v.observations)
    observations[1] = dataclasses.replace(observations[1], update=update)
    broken = config.invert(observations, v.guesses, v.knowledge, Run())
    for i in (0, 2, 3):
        torch.testing.assert_close(broken[i].images, clean[i].images, rtol=0, atol=1e-6)
        assert broken[i].stop_reason == clean[i].stop_reason
        assert broken[i].evaluations == clean[i].evaluations
    assert broken[1].stop_reason == "diverged" or broken[1].objective > 1e20
    assert broken[1].images.isfinite().all()


def test_results_depend_on_nothing_else_in_the_call(victims) -> None:
    v = victims(4, dtype=torch.float64)
    forward = GradientMatching(start="uniform", **SHORT).invert(v.observations, v.guesses, v.knowledge, Run(seed=3))
    backward = GradientMatching(start="uniform", **SHORT).invert(
        v.observations[::-1], v.guesses[::-1], v.knowledge, Run(seed=3)
    )
    same(forward, backward[::-1], atol=1e-6)
    other = GradientMatching(start="uniform", **SHORT).invert(v.observations, v.guesses, v.knowledge, Run(seed=4))
    assert all(abs(a.objective / b.objective - 1) > 1e-3 for a, b in zip(forward, other, strict=True))


def test_stop_reasons(victims) -> None:
    v = victims(2)

    def reason(**settings: Any) -> Reconstruction:
        return GradientMatching(restarts=1, **settings).invert(v.observations[:1], v.guesses[:1], v.knowledge, Run())[0]

    budget = reason(max_evaluations=7)
    assert (budget.stop_reason, budget.evaluations) == ("budget", 7)
    assert reason(tolerance=1e9).evaluations == 1
    assert reason(tolerance=1e9).stop_reason == "converged"
    stalled = reason(optimizer=Adam(lr=0.0), patience=5)
    assert (stalled.stop_reason, stalled.evaluations) == ("stalled", 6)
    diverged = reason(optimizer=Adam(lr=30.0))
    assert diverged.stop_reason == "diverged"
    assert diverged.evaluations < 10
    assert diverged.objective < float("inf")  # the best iterate is kept, and it is the start


class Sabotage(Optimizer):
    """Runs away on its first start of every row, then does its work."""

    def __init__(self, bad: int) -> None:
        self.inner = LBFGS()
        self.bad = bad
        self.begun = 0

    def init(self, x: Tensor) -> dict[str, Tensor]:
        self.begun += 1
        return {**self.inner.init(x), "bad": torch.full((len(x),), self.begun <= self.bad)}

    def step(self, state, x, value, gradient, progress):  # type: ignore[no-untyped-def]
        inner = {name: tensor for name, tensor in state.items() if name != "bad"}
        moved = self.inner.step(inner, x, value, gradient, progress)
        state |= inner
        return torch.where(state["bad"][:, None], torch.full_like(x, float("nan")), moved)


def test_only_failed_starts_are_followed_by_another(victims) -> None:
    v = victims(1)
    result = GradientMatching(optimizer=Sabotage(bad=2 + 1), chunk_size=1, restarts=5).invert(
        v.observations, v.guesses, v.knowledge, Run()
    )[0]  # the first call of init measures memory only where the chunk size is not given
    assert result.stop_reason == "converged"
    assert result.restarts == 4
    assert result.details["start"] == 3
    gave_up = GradientMatching(optimizer=Sabotage(bad=99), chunk_size=1, restarts=3).invert(
        v.observations, v.guesses, v.knowledge, Run()
    )[0]
    assert (gave_up.stop_reason, gave_up.restarts, gave_up.evaluations) == ("diverged", 3, 6)
    easy = GradientMatching(restarts=5).invert(v.observations, v.guesses, v.knowledge, Run())[0]
    assert easy.restarts == 1


def test_restarts_begin_elsewhere(victims) -> None:
    v = victims(1)
    for start in ("normal", "uniform", "grey"):
        config = GradientMatching(start=start, restarts=3, max_evaluations=1)
        points = [first_images(config, v, v.observations[0], restart) for restart in range(3)]
        assert not torch.equal(points[0], points[1])
        assert not torch.equal(points[1], points[2])
        assert torch.equal(points[2], first_images(config, v, v.observations[0], 2))
    assert torch.equal(points[0], torch.full_like(points[0], 0.5))


def test_joint_labels_are_the_optimised_ones(victims) -> None:
    v = victims(6, classes=8)
    results = GradientMatching(restarts=6, max_evaluations=1500).invert(v.observations, [None] * 6, v.knowledge, Run())
    assert [r.stop_reason for r in results] == ["converged"] * 6
    assert torch.equal(torch.stack([r.labels for r in results]), v.labels)
    assert errors(results, v.images).max() < 1e-3


def test_label_candidates_are_tried_and_the_best_kept(victims) -> None:
    v = victims(3)
    wrong = [torch.stack([(y + 1) % 5, (y + 2) % 5, y]) for y in v.labels]
    guesses = [LabelGuess(labels, torch.ones(3)) for labels in wrong]
    results = GradientMatching(candidates=3, restarts=1, max_evaluations=600).invert(
        v.observations, guesses, v.knowledge, Run()
    )
    assert torch.equal(torch.stack([r.labels for r in results]), v.labels)
    assert [r.details["candidate"] for r in results] == [2, 2, 2]
    first_only = GradientMatching(restarts=1, max_evaluations=200).invert(v.observations, guesses, v.knowledge, Run())
    assert all(a.objective > 100 * b.objective for a, b in zip(first_only, results, strict=True))


def test_gradients_of_single_samples(victims) -> None:
    v = victims(1, batch=3)
    model = v.knowledge.model
    parts = [victims.observe(model, x[None], y[None]).update for x, y in zip(v.images[0], v.labels[0], strict=True)]
    shuffle = [2, 0, 1]  # the guess is sorted, the samples are not
    update = {name: torch.stack([parts[i][name] for i in shuffle]) for name in parts[0]}
    observation = dataclasses.replace(v.observations[0], update=update, training=PER_SAMPLE)
    for guess in (v.guesses[0], None):
        (result,) = GradientMatching(restarts=4).invert([observation], [guess], v.knowledge, Run())
        assert result.stop_reason == "converged"
        assert torch.equal(result.labels, v.labels[0][shuffle])
        assert errors([result], v.images[:, shuffle]).max() < 1e-3


def test_new_weights_are_read_as_the_gradient_they_stand_for(victims) -> None:
    v = victims(2, dtype=torch.float64)
    lr, steps = 0.1, 2
    weights = [
        dataclasses.replace(
            o,
            training=LocalTraining("weights", 1, steps, optimizer=SGD(lr)),
            update={name: o.parameters[name] - lr * steps * value for name, value in o.update.items()},
        )
        for o in v.observations
    ]
    same(
        GradientMatching(**SHORT).invert(weights, v.guesses, v.knowledge, Run()),
        GradientMatching(**SHORT).invert(v.observations, v.guesses, v.knowledge, Run()),
    )


def test_the_clients_own_steps_are_gone_through_where_asked_for(victims) -> None:
    v = victims(1, batch=2, dtype=torch.float64)
    training = LocalTraining("weights", 1, 2, optimizer=SGD(0.3, momentum=0.9))
    start = v.observations[0].parameters
    images, labels = v.images[0].double(), v.labels[0]
    sent = local_update(v.knowledge.model, start, {}, images, labels, training).update
    observation = dataclasses.replace(v.observations[0], update=sent, training=training)
    settings: dict[str, Any] = {**SHORT, "max_evaluations": 150, "objective": L2(relative=True), "start": "grey"}
    found = []
    for unroll in (True, False):
        config = GradientMatching(unroll=unroll, optimizer=LBFGS(max_step=0.5), **settings)
        found += config.invert([observation], v.guesses, v.knowledge, Run())
    assert errors(found[:1], v.images).max() < 1e-2 < errors(found[1:], v.images).max()
    assert (GradientMatching().needs_scale, GradientMatching(unroll=True).needs_scale) == (True, False)


def test_results_come_as_they_finish(victims) -> None:
    v = victims(4)
    observations = [dataclasses.replace(v.observations[0], error="sent NaN"), *v.observations[1:]]
    events: list[tuple[int, int]] = []
    seen: list[Progress] = []
    results = GradientMatching(chunk_size=1, restarts=3).invert(
        observations,
        v.guesses,
        v.knowledge,
        Run(on_result=lambda index, result: events.append((index, len(events))), on_progress=seen.append),
    )
    assert sorted(index for index, _ in events) == [0, 1, 2, 3]
    assert events[0] == (0, 0)  # what cannot be attacked is said at once
    broken = results[0]
    assert (broken.stop_reason, broken.evaluations, broken.restarts) == ("sent NaN", 0, 0)
    assert broken.objective != broken.objective
    assert torch.equal(broken.images, torch.full((1, 1, 8, 8), 0.5))
    assert seen[-1].done == seen[-1].problems == 3
    assert seen[-1].evaluations == sum(r.evaluations for r in results)
    assert all(a.done <= b.done for a, b in pairwise(seen))

    class Stop(Exception):
        pass

    kept: dict[int, Reconstruction] = {}

    def keep_two(index: int, result: Reconstruction) -> None:
        kept[index] = result
        if len(kept) == 2:
            raise Stop

    with pytest.raises(Stop):
        GradientMatching(chunk_size=1).invert(v.observations, v.guesses, v.knowledge, Run(on_result=keep_two))
    assert all(r.stop_reason == "converged" for r in kept.values())


def test_out_of_memory_halves_the_chunk_and_goes_on(victims, monkeypatch: pytest.MonkeyPatch) -> None:
    v = victims(5, dtype=torch.float64)
    wanted = GradientMatching(**SHORT).invert(v.observations, v.guesses, v.knowledge, Run())
    sizes: list[int] = []
    evaluate = ChainDistance.evaluate

    def small(self, rows, images, labels, **options):  # type: ignore[no-untyped-def]
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return evaluate(self, rows, images, labels, **options)

    monkeypatch.setattr(ChainDistance, "evaluate", small)
    found = GradientMatching(**SHORT).invert(v.observations, v.guesses, v.knowledge, Run())
    same(found, wanted)
    assert sizes[0] == 5
    assert max(sizes[1:]) == 2

    def never(self, rows, images, labels, **options):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(ChainDistance, "evaluate", never)
    with pytest.raises(torch.OutOfMemoryError):
        GradientMatching(**SHORT).invert(v.observations, v.guesses, v.knowledge, Run())


def test_trace_and_best_iterate(victims) -> None:
    v = victims(2)
    config = GradientMatching(
        trace_every=10, max_evaluations=95, tolerance=0.0, restarts=1, start="grey", optimizer=LBFGS(max_step=0.5)
    )
    results = config.invert(v.observations, v.guesses, v.knowledge, Run())
    for r in results:
        assert r.evaluations == 95
        assert [step for step, _ in r.trace] == list(range(10, r.evaluations + 1, 10))
        assert r.objective <= min(value for _, value in r.trace)
        assert r.trace[-1][1] < r.trace[0][1]


def test_snapshots_lead_from_the_start_to_the_returned_images_and_change_nothing(victims) -> None:
    v = victims(3, batch=2)
    settings: dict[str, Any] = {"max_evaluations": 700, "tolerance": 1e-5, "restarts": 2}
    config = GradientMatching(trace_every=10, **settings)
    results = config.invert(v.observations, v.guesses, v.knowledge, Run())
    plain = GradientMatching(**settings).invert(v.observations, v.guesses, v.knowledge, Run())
    for r, p, o in zip(results, plain, v.observations, strict=True):
        assert torch.equal(r.images, p.images)
        assert (r.objective, r.evaluations, r.stop_reason) == (p.objective, p.evaluations, p.stop_reason)
        assert p.snapshots == []
        counts = [count for count, _ in r.snapshots]
        assert len(counts) <= MOST_SNAPSHOTS
        assert counts == sorted(set(counts))
        assert counts[-1] == r.evaluations if r.restarts == 1 else counts[-1] < r.evaluations
        start = first_images(config, v, o, r.details["start"])
        assert counts[0] == 1
        torch.testing.assert_close(r.snapshots[0][1], start.clamp(0, 1).half(), rtol=0, atol=1e-3)
        assert torch.equal(r.snapshots[-1][1], r.images.half())
    first, last = (dataclasses.replace(results[0], images=results[0].snapshots[i][1].float()) for i in (0, -1))
    assert errors([last], v.images[:1]).max() < 0.1 * errors([first], v.images[:1]).min()


def test_many_evaluations_leave_few_snapshots_spread_over_all_of_them(victims) -> None:
    v = victims(1)
    # Steady small steps: the images change all the time.
    config = GradientMatching(
        trace_every=1, restarts=1, max_evaluations=600, tolerance=0.0, optimizer=Adam(lr=0.003), patience=10**9
    )
    (result,) = config.invert(v.observations, v.guesses, v.knowledge, Run())
    counts = [count for count, _ in result.snapshots]
    assert (counts[0], counts[-1], len(counts)) == (1, 600, MOST_SNAPSHOTS)
    assert all(1 < b / a < 5 for a, b in pairwise(counts[1:]))
    assert all((a - b).abs().max() > 0.01 for (_, a), (_, b) in pairwise(result.snapshots))


def test_images_that_do_not_move_need_no_snapshots_between(victims) -> None:
    v = victims(1)
    config = GradientMatching(trace_every=1, restarts=1, max_evaluations=50, tolerance=0.0, optimizer=Adam(lr=0.0))
    (result,) = config.invert(v.observations, v.guesses, v.knowledge, Run())
    assert [count for count, _ in result.snapshots] == [1, 50]


def test_snapshots_of_single_samples_stand_side_by_side(victims) -> None:
    v = victims(1, batch=2)
    parts = [
        victims.observe(v.knowledge.model, x[None], y[None]).update
        for x, y in zip(v.images[0], v.labels[0], strict=True)
    ]
    update = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    observation = dataclasses.replace(v.observations[0], update=update, training=PER_SAMPLE)
    (result,) = GradientMatching(restarts=4, trace_every=10).invert([observation], v.guesses, v.knowledge, Run())
    assert result.stop_reason == "converged"
    assert all(images.shape == (2, 1, 8, 8) for _, images in result.snapshots)
    assert torch.equal(result.snapshots[-1][1], result.images.half())
    assert result.snapshots[0][0] == 1


def test_what_memory_interrupted_is_followed_from_its_beginning(victims, monkeypatch: pytest.MonkeyPatch) -> None:
    v = victims(3, dtype=torch.float64)
    config = GradientMatching(trace_every=4, **SHORT)
    wanted = config.invert(v.observations, v.guesses, v.knowledge, Run())
    evaluate, calls = ChainDistance.evaluate, 0

    def once(self, rows, images, labels, **options):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 11:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return evaluate(self, rows, images, labels, **options)

    monkeypatch.setattr(ChainDistance, "evaluate", once)
    found = config.invert(v.observations, v.guesses, v.knowledge, Run())
    same(found, wanted)
    for one, other in zip(found, wanted, strict=True):
        assert [count for count, _ in one.trace] == [count for count, _ in other.trace]
        assert [count for count, _ in one.snapshots] == [count for count, _ in other.snapshots]


def test_what_waited_when_memory_ran_out_is_not_forgotten(victims, monkeypatch: pytest.MonkeyPatch) -> None:
    v = victims(4, dtype=torch.float64)
    config = GradientMatching(chunk_size=2, **SHORT)
    wanted = config.invert(v.observations, v.guesses, v.knowledge, Run())
    load, calls = ChainDistance.load, 0

    def second(self, problems):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 2:  # the first two have ended and make room
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return load(self, problems)

    monkeypatch.setattr(ChainDistance, "load", second)
    same(config.invert(v.observations, v.guesses, v.knowledge, Run()), wanted)


def test_first_images_may_come_from_elsewhere(victims) -> None:
    v = victims(2)
    known: list[Tensor | None] = [v.images[0], None]
    results = GradientMatching(initial=lambda *_: known, tolerance=1e-7).invert(
        v.observations, v.guesses, v.knowledge, Run()
    )
    assert results[0].evaluations == 1
    assert results[0].objective < 1e-7
    assert results[1].evaluations > 10
    with pytest.raises(UsageError, match=r"initial.*\[1, 1, 8, 8\]"):
        GradientMatching(initial=lambda *_: [v.images[0, 0], None]).invert(
            v.observations, v.guesses, v.knowledge, Run()
        )


def test_signed_adam_with_cosine_and_prior_stays_in_the_box(victims) -> None:
    v = victims(2)
    config = GradientMatching(
        objective=Cosine(),
        priors=[TotalVariation(weight=1e-4)],
        optimizer=Adam(lr=0.05, signed=True, schedule="drops"),
        project=True,
        max_evaluations=300,
        restarts=1,
        trace_every=100,
        tolerance=1e-9,
    )
    results = config.invert(v.observations, v.guesses, v.knowledge, Run())
    start = first_images(config, v, v.observations[0], 0)
    assert errors(results, v.images).max() < 0.1 * (start - v.images[0]).square().mean()
    assert all(0 < r.objective < 0.05 for r in results)
    # The prior is part of what is reported.
    matched = GradientMatching(objective=Cosine(), initial=lambda *_: [r.images for r in results], max_evaluations=1)
    bare = matched.invert(v.observations, v.guesses, v.knowledge, Run())
    assert all(r.objective > b.objective for r, b in zip(results, bare, strict=True))


def test_mistakes_are_named(victims) -> None:
    v = victims(1)
    with pytest.raises(UsageError, match="start=gray"):
        GradientMatching(start="gray")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="restarts=0"):
        GradientMatching(restarts=0)
    blind = dataclasses.replace(v.observations[0], training=LocalTraining(local_steps=1))
    with pytest.raises(UsageError, match="batch_size"):
        GradientMatching().invert([blind], [None], v.knowledge, Run())
    other = dataclasses.replace(v.observations[0], update={"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(UsageError, match="the model it was trained with"):
        GradientMatching().invert([other], v.guesses, v.knowledge, Run())
    with pytest.raises(UsageError, match="1 observations but 0 label guesses"):
        GradientMatching().invert(v.observations, [], v.knowledge, Run())


def test_annealed_priors_give_way_to_the_update(victims) -> None:
    v = victims(3, dtype=torch.float64)
    common: dict[str, Any] = {
        "objective": L2(relative=True),
        "start": "grey",
        "optimizer": LBFGS(line_search="backtracking"),
        "dtype": "float64",
        "restarts": 1,
        "max_evaluations": 60,
        "trace_every": 20,
        "tolerance": 0.0,
    }
    prior = [SmoothTotalVariation(weight=1e-2)]
    one = GradientMatching(priors=prior, **common).invert(v.observations, v.guesses, v.knowledge, Run())
    common |= {"priors": prior, "anneal": (1.0, 0.1, 0.0)}
    three = GradientMatching(**common).invert(v.observations, v.guesses, v.knowledge, Run())
    assert all(a.objective < 0.1 * b.objective for a, b in zip(three, one, strict=True))
    assert errors(three, v.images).mean() < 0.5 * errors(one, v.images).mean()
    assert [[step for step, _ in r.trace] for r in three] == [list(range(20, 181, 20))] * 3
    chunks = GradientMatching(chunk_size=2, **common)
    same(chunks.invert(v.observations, v.guesses, v.knowledge, Run()), three, atol=1e-4)
    with pytest.raises(UsageError, match="anneal"):
        GradientMatching(priors=prior, anneal=())


class Residual(nn.Module):
    """Not a chain, with batch statistics and running ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.more, self.fc = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6 * 64, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.sigmoid(self.norm(self.conv(images)))
        return self.fc((x + torch.tanh(self.more(x))).flatten(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_any_module_works(victims, training: bool, shared: bool) -> None:
    v = victims(3, batch=2)
    torch.manual_seed(0)
    model = Residual().train(training)
    observations = []
    for i, (images, labels) in enumerate(zip(v.images, v.labels, strict=True)):
        if not shared:
            model = Residual().train(training)
        buffers = {
            name: value.clone() + (i if name == "norm.running_mean" else 0) for name, value in model.named_buffers()
        }
        model.load_state_dict(buffers, strict=False)
        observation = victims.observe(model, images, labels, client=i)
        how = dataclasses.replace(observation.training, training_mode=training)
        observations.append(dataclasses.replace(observation, start_buffers=buffers, training=how))
    knowledge = dataclasses.replace(v.knowledge, model=Residual())
    config = GradientMatching(
        objective=L2(relative=True), start="grey", optimizer=LBFGS(max_step=0.5), restarts=1, max_evaluations=150
    )
    results = config.invert(observations, v.guesses, knowledge, Run())
    assert all(r.objective < 1e-2 for r in results)
    truth = GradientMatching(objective=L2(relative=True), initial=lambda *_: list(v.images), max_evaluations=1)
    assert all(r.objective < 1e-8 for r in truth.invert(observations, v.guesses, knowledge, Run()))
