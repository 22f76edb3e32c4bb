from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from fedleak.evaluation.matching import Frame, Match
from fedleak.report.common import evenly
from fedleak.report.pictures import _figure, _strips, evolution_png, pixels, reconstructions_png

LEAK = np.array([0xC0, 0x3A, 0x06])


def pair(round: int = 1, image: int = 0, *, shape=(1, 8, 8), recovered: bool | None = True, **changes) -> Match:
    picture = torch.rand(*shape, generator=torch.Generator().manual_seed(image))
    given = {"label_true": 3, "label_inferred": 3, "mse": 2e-5, "psnr": 47.0, "ssim": 0.99, "recovered": recovered}
    return Match(round, 0, image, **(given | {"true": picture, "rebuilt": picture} | changes))


def words(matches: list[Match]) -> str:
    return "\n".join(text.get_text() for text in _figure(matches, "Title").axes[0].texts)


def read(path) -> np.ndarray:
    return (imread(path)[..., :3] * 255).round().astype(int)


def framed(path) -> int:
    """How many pixels have the colour of the frame around a recovered image."""
    return int((abs(read(path) - LEAK).max(axis=-1) < 3).sum())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 6, 12), (2, 8, 8)])
@pytest.mark.parametrize("truth", [True, False])
def test_any_shape_with_and_without_truth(tmp_path, shape, truth):
    blank = {} if truth else dict.fromkeys(("true", "label_true", "mse", "psnr", "ssim", "recovered"))
    matches = [pair(round, image, shape=shape, **blank) for round in (1, 2) for image in range(3)]
    reconstructions_png(tmp_path / "r.png", matches)
    drawn = _figure(matches, "").axes[0].images
    assert len(drawn) == (12 if truth else 6)
    left, right, bottom, top = drawn[0].get_extent()
    assert (bottom - top) / (right - left) == pytest.approx(shape[1] / shape[2])
    assert read(tmp_path / "r.png").size


def test_a_recovered_image_is_marked_and_another_is_not(tmp_path):
    reconstructions_png(tmp_path / "yes.png", [pair()])
    reconstructions_png(tmp_path / "no.png", [pair(recovered=False, mse=0.2, psnr=7.0)])
    assert framed(tmp_path / "yes.png") > 1000
    assert framed(tmp_path / "no.png") == 0
    assert "✓ 47 dB · MSE 2.0e-5" in words([pair()])
    assert "1 of 1 private image recovered" in words([pair()])
    assert "✓" not in words([pair(recovered=False, mse=0.2, psnr=7.0)]).replace("(framed, ✓", "")


def test_a_wrong_label_is_shown():
    assert "✗" not in words([pair()])
    assert "3 → 5 ✗" in words([pair(label_inferred=5)])
    assert "3 → ? ✗" in words([pair(label_inferred=None)])


def test_what_is_left_out_is_said():
    text = words([pair(round, image) for round in range(1, 21) for image in range(9)])
    assert "8 of the 20 attacked rounds" in text
    assert "the first 8 images" in text
    assert "20 of" not in words([pair(round) for round in range(1, 9)])
    assert "9 / 9 recovered" in text


def test_labels_alone(tmp_path):
    match = pair(rebuilt=None, mse=None, psnr=None, ssim=None, recovered=False)
    reconstructions_png(tmp_path / "r.png", [match])
    assert "not rebuilt" in words([match])


def test_nothing_rebuilt_gives_a_picture_that_says_so(tmp_path):
    reconstructions_png(tmp_path / "r.png", [])
    assert "Nothing was rebuilt" in words([])
    assert read(tmp_path / "r.png").min() < 100


def test_a_large_picture_of_noise_stays_small(tmp_path):
    matches = [pair(round, image, shape=(3, 64, 64)) for round in range(1, 9) for image in range(8)]
    reconstructions_png(tmp_path / "r.png", matches)
    assert (tmp_path / "r.png").stat().st_size < 1_000_000


def film(errors: list[float | None], **changes) -> Match:
    start = pair(**changes)
    return replace(start, frames=tuple(Frame(2**i, start.rebuilt.half(), e) for i, e in enumerate(errors)))


def test_a_film_runs_from_the_start_to_the_returned_image(tmp_path):
    evolution_png(tmp_path / "e.png", [film([0.2, 4e-3, 2e-5]), pair(2)])
    assert framed(tmp_path / "e.png") > 500
    axes = _strips([film([0.2, 4e-3, 2e-5])], "").axes[0]
    assert len(axes.images) == 4  # the private one and three frames
    said = [text.get_text() for text in axes.texts]
    assert said[-6:] == ["start", "MSE 0.2", "2 evaluations", "MSE 4.0e-3", "4 evaluations", "✓ MSE 2.0e-5"]
    assert not any("round 2" in text for text in said)
    evolution_png(tmp_path / "no.png", [film([0.2, 0.1])])
    assert framed(tmp_path / "no.png") == 0


def test_a_film_without_truth_and_of_many_images():
    alone = _strips([film([None, None], true=None, label_true=None, mse=None)], "").axes[0]
    assert len(alone.images) == 2
    assert not any("MSE" in text.get_text() for text in alone.texts)
    many = _strips([film([0.1, 0.01], round=number) for number in range(1, 21)], "").axes[0]
    assert len(many.images) == 8 * 3
    assert any("8 of 20 images" in text.get_text() for text in many.texts)


def test_pixels():
    grey = torch.tensor([[[0.0, 1.0, 0.5, float("nan"), 2.0, -1.0]]])
    assert pixels(grey)[0, :, 0].tolist() == [0, 255, 128, 0, 255, 0]
    colour = torch.rand(3, 4, 5)
    assert (abs(pixels(colour) / 255 - colour.permute(1, 2, 0).numpy()) <= 0.5 / 255 + 1e-6).all()


@pytest.mark.parametrize(("count", "most"), [(0, 8), (5, 8), (8, 8), (9, 8), (1000, 8), (3, 1)])
def test_evenly(count, most):
    chosen = evenly(count, most)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, most)
    assert not count or chosen[0] == 0
    assert count <= 1 or most == 1 or chosen[-1] == count - 1
