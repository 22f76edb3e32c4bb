"""Gradient matching: many problems together give what each gives alone, and every end has its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedleak.attacks.base import Reconstruction
from fedleak.attacks.inversion import GradientMatching


def errors(results: list[Reconstruction], truth: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each image [N, B]; batches here are small and in order of labels."""
    return torch.stack([(r.images - t).square().flatten(1).mean(1) for r, t in zip(results, truth, strict=True)])


def same(left: list[Reconstruction], right: list[Reconstruction], atol: float = 1e-5) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a.images, b.images, rtol=0, atol=atol)
        assert torch.equal(a.labels, b.labels)
        assert (a.stop_reason, a.restarts) == (b.stop_reason, b.restarts)
        assert abs(a.evaluations - b.evaluations) <= 2


SHORT: dict[str, Any] = {"dtype": "float64", "max_evaluations": 30, "restarts": 1}


def test_images_come_back(victims) -> None:
    v = victims(6)
    results = GradientMatching(tolerance=1e-8).invert(v.observations, v.guesses, v.knowledge)
    assert [r.stop_reason for r in results] == ["converged"] * 6
    assert errors(results, v.images).max() < 1e-3
    assert all(r.images.dtype == torch.float32 and r.images.min() >= 0 and r.images.max() <= 1 for r in results)
    assert all(r.objective <= 1e-8 and r.evaluations > 10 and r.seconds > 0 for r in results)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_together_as_alone_and_in_chunks(victims, batch: int, shared: bool) -> None:
    v = victims(5, batch=batch, shared=shared, dtype=torch.float64)
    together = GradientMatching(**SHORT).invert(v.observations, v.guesses, v.knowledge)
    alone = [
        GradientMatching(**SHORT).invert([o], [g], v.knowledge)[0]
        for o, g in zip(v.observations, v.guesses, strict=True)
    ]
    same(together, alone, atol=1e-6)
    same(together, GradientMatching(chunk_size=2, **SHORT).invert(v.observations, v.guesses, v.knowledge), atol=1e-6)
    assert len({r.objective for r in together}) == 5  # five problems, not five times one
