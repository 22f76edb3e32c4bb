import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedleak.evaluation.metrics import RECOVERED_MSE, label_accuracy, labels_exact, mse, psnr, ssim


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_mse_and_psnr_of_a_known_error():
    truth = torch.full((2, 1, 4, 4), 0.5)
    rebuilt = truth.clone()
    rebuilt[1] += 0.1
    assert mse(truth, rebuilt).tolist() == pytest.approx([0, 0.01], rel=1e-5)
    assert psnr(truth, rebuilt)[0] == math.inf
    assert psnr(truth, rebuilt)[1].item() == pytest.approx(20, rel=1e-5)


def test_recovered_is_thirty_decibels():
    truth = torch.zeros(1, 1, 2, 2)
    assert psnr(truth, truth + RECOVERED_MSE**0.5).item() == pytest.approx(30, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_image_that_is_not_finite_is_infinitely_wrong(bad):
    truth, rebuilt = images(2, 1, 12, 12), images(2, 1, 12, 12)
    rebuilt[0, 0, 3, 3] = bad
    assert mse(truth, rebuilt).tolist() == [math.inf, 0]
    assert psnr(truth, rebuilt)[0] == -math.inf
    assert math.isnan(ssim(truth, rebuilt)[0])
    assert ssim(truth, rebuilt)[1] == pytest.approx(1)


@pytest.mark.parametrize("metric", [mse, psnr, ssim])
def test_shapes_must_agree(metric):
    with pytest.raises(ValueError, match="one shape"):
        metric(images(2, 1, 8, 8), images(1, 1, 8, 8))


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (2, 3, 32, 32), (2, 1, 11, 17)])
def test_psnr_and_ssim_agree_with_torchmetrics(shape):
    reference = pytest.importorskip("torchmetrics.functional.image", reason="torchmetrics is not installed")
    truth = images(*shape)
    rebuilt = (truth + 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    _, maps = reference.structural_similarity_index_measure(rebuilt, truth, data_range=1.0, return_full_image=True)
    expected = maps[..., 5:-5, 5:-5].flatten(1).mean(dim=1)  # it averages the border too, where the window leaves
    assert ssim(truth, rebuilt).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    decibels = reference.peak_signal_noise_ratio(rebuilt, truth, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert psnr(truth, rebuilt).tolist() == pytest.approx(decibels.tolist(), abs=1e-3)


def test_ssim_agrees_with_its_formula_at_a_single_window():
    # 11×11 leaves one window, so the mean is one evaluation of the published formula.
    a, b = images(1, 1, 11, 11, seed=2), images(1, 1, 11, 11, seed=3)
    x, y = a[0, 0].double().numpy(), b[0, 0].double().numpy()
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weight = np.outer(line, line) / line.sum() ** 2
    mx, my = (weight * x).sum(), (weight * y).sum()
    vx, vy = (weight * x * x).sum() - mx**2, (weight * y * y).sum() - my**2
    cov = (weight * x * y).sum() - mx * my
    c1, c2 = 0.01**2, 0.03**2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (6, 6), (8, 8), (10, 40)])
@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_of_images_smaller_than_the_window(size, channels):
    truth = images(2, channels, *size)
    assert ssim(truth, truth).tolist() == pytest.approx([1, 1])
    other = ssim(truth, 0.2 * truth)
    assert other.isfinite().all()
    assert (other < 0.999).all()


def test_label_accuracy_of_the_published_worked_example():
    assert label_accuracy(torch.tensor([2, 2, 2, 5, 7, 8]), torch.tensor([2, 2, 2, 2, 5, 8])) == 5 / 6


labels = st.lists(st.integers(0, 4), max_size=8)


@given(true=labels.filter(len), inferred=labels)
def test_label_scores_agree_with_counters(true, inferred):
    overlap = (Counter(true) & Counter(inferred)).total()
    assert label_accuracy(torch.tensor(true), torch.tensor(inferred, dtype=torch.int64)) == overlap / len(true)
    exact = Counter(true) == Counter(inferred)
    assert labels_exact(torch.tensor(true), torch.tensor(inferred, dtype=torch.int64)) is exact


def test_label_accuracy_without_true_labels():
    with pytest.raises(ValueError, match="at least one"):
        label_accuracy(torch.tensor([], dtype=torch.int64), torch.tensor([1]))
