import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedleak.attacks.results import Reconstruction
from fedleak.evaluation.matching import assign, match
from fedleak.truth import Truth


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(b=st.integers(0, 5), c=st.integers(0, 5), seed=st.integers(0, 1000))
def test_assign_is_the_best_of_all_assignments(b, c, seed):
    truth, rebuilt = images(b, 1, 3, 3, seed=seed), images(c, 1, 3, 3, seed=seed + 1)
    matched = assign(truth, rebuilt)
    chosen = [(i, j) for i, j in enumerate(matched.tolist()) if j >= 0]
    assert len(chosen) == min(b, c) == len({j for _, j in chosen})

    def cost(pairs):
        return sum(((truth[i] - rebuilt[j]) ** 2).sum().item() for i, j in pairs)

    if b <= c:
        every = (list(zip(range(b), p, strict=True)) for p in itertools.permutations(range(c), b))
    else:
        every = (list(zip(p, range(c), strict=True)) for p in itertools.permutations(range(b), c))
    assert cost(chosen) == pytest.approx(min(map(cost, every)), abs=1e-6)


def test_assign_undoes_a_permutation():
    truth = images(16, 3, 8, 8)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    rebuilt = truth[order] + 0.01
    assert torch.equal(order[assign(truth, rebuilt)], torch.arange(16))


def test_assign_gives_what_is_not_finite_to_whom_nothing_better_is_left():
    truth = images(3, 1, 4, 4)
    rebuilt = truth.flip(0).clone()
    rebuilt[0, 0, 0, 0] = math.nan
    assert assign(truth, rebuilt).tolist() == [2, 1, 0]


def test_assign_refuses_images_of_another_shape():
    with pytest.raises(ValueError, match="compare"):
        assign(images(1, 1, 8, 8), images(1, 3, 8, 8))


def batch(labels: list[int], *, channels: int = 1, round: int = 3, client: int = 5) -> Truth:
    generator = torch.Generator().manual_seed(len(labels))
    images = torch.rand(len(labels), channels, 12, 12, generator=generator)
    return Truth(round, client, images, torch.tensor(labels))


def rebuilt(images: torch.Tensor, labels: list[int], **changes) -> Reconstruction:
    given = {"round": 3, "client": 5, "objective": 1e-9, "evaluations": 70, "seconds": 0.5, "stop_reason": "converged"}
    return Reconstruction(images=images, labels=torch.tensor(labels, dtype=torch.int64), **(given | changes))


def test_frames_follow_the_image_that_was_matched_at_the_end():
    truth = batch([2, 7])
    shuffled = truth.images.flip(0) + 1e-3
    snapshots = [(1, torch.zeros(2, 1, 12, 12)), (8, truth.images + 0.1), (20, shuffled)]  # after 8 the other way round
    halves = [(count, images.half()) for count, images in snapshots]
    first, second = match(rebuilt(shuffled, [7, 2], snapshots=halves), truth)
    for i, m in enumerate((first, second)):
        assert [frame.evaluations for frame in m.frames] == [1, 8, 20]
        true = truth.images[i]
        assert m.frames[0].mse == pytest.approx(float(true.square().mean()), rel=1e-3)
        assert m.frames[1].mse == pytest.approx(float((truth.images[1 - i] + 0.1 - true).square().mean()), rel=1e-2)
        assert m.frames[2].mse == m.mse == pytest.approx(1e-6, rel=1e-3)
        assert torch.equal(m.frames[2].image, m.rebuilt)
    alone = match(rebuilt(shuffled, [7, 2], snapshots=halves), None)
    assert torch.equal(alone[1].frames[1].image, halves[1][1][1])
    assert [frame.mse for frame in alone[1].frames] == [None] * 3
    assert match(rebuilt(shuffled, [7, 2]), truth)[0].frames == ()


def test_similarity_can_be_left_out():
    truth = batch([1, 2])
    near = rebuilt((truth.images + 0.1).clamp(0, 1), [1, 2])
    full, quick = match(near, truth), match(near, truth, similarity=False)
    assert all(m.ssim is not None and 0 < m.ssim < 1 for m in full)
    assert [m.ssim for m in quick] == [None, None]
    assert [m.mse for m in quick] == [m.mse for m in full]


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="compare"):
        match(rebuilt(torch.zeros(1, 3, 12, 12), [1]), batch([1]))


def test_limits_follow_the_private_images_and_expectations_the_rebuilt_ones():
    truth = batch([2, 7])
    limits = torch.tensor([1e-9, 2e-9], dtype=torch.float64)
    shuffled = rebuilt(truth.images.flip(0), [7, 2], details={"expected_mse": [3e-9, 4e-9]})
    pairs = match(shuffled, truth, limit_mse=limits)
    assert [(m.label_true, m.limit_mse, m.expected_mse) for m in pairs] == [(2, 1e-9, 4e-9), (7, 2e-9, 3e-9)]
    assert [(m.limit_mse, m.expected_mse) for m in match(shuffled, None)] == [(None, 3e-9), (None, 4e-9)]
    one = rebuilt(truth.images[1:], [7], details={"expected_mse": 5e-9})
    assert [(m.limit_mse, m.expected_mse) for m in match(one, truth, limit_mse=limits)] == [(1e-9, None), (2e-9, 5e-9)]
    alone = rebuilt(truth.images, [2, 7], stop_reason="labels_only", details={"expected_mse": [1.0, 1.0]})
    assert [(m.limit_mse, m.expected_mse) for m in match(alone, truth, limit_mse=limits)] == [
        (1e-9, None),
        (2e-9, None),
    ]
    with pytest.raises(ValueError, match="argument"):
        match(shuffled, truth, limit_mse=limits[:1])
