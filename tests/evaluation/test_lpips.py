"""LPIPS against torchmetrics' with the same weights, and what it says where its weights are not at hand."""

import pytest
import torch

from fedleak.errors import UsageError
from fedleak.evaluation.lpips import load_lpips

SIZES = ((64, 11), (192, 5), (384, 3), (256, 3), (256, 3))


@pytest.fixture
def folder(tmp_path):
    random, channels, state = torch.Generator().manual_seed(0), 3, {}
    for place, (count, size) in zip((0, 3, 6, 8, 10), SIZES, strict=True):
        scale = (2 / (channels * size**2)) ** 0.5
        state[f"features.{place}.weight"] = scale * torch.randn(count, channels, size, size, generator=random)
        state[f"features.{place}.bias"] = 0.1 * torch.randn(count, generator=random)
        channels = count
    torch.save(state, tmp_path / "alexnet-some.pth")
    return tmp_path


def test_it_is_torchmetrics_own(folder):
    from torchmetrics.functional.image.lpips import _LPIPS

    theirs = _LPIPS(net="alex", pnet_rand=True).eval()
    state = torch.load(folder / "alexnet-some.pth", weights_only=True)
    layers = {name: layer for part in theirs.net.children() for name, layer in part.named_children()}
    for name, layer in layers.items():
        if f"features.{name}.weight" in state:
            layer.load_state_dict({key: state[f"features.{name}.{key}"] for key in ("weight", "bias")})
    images = torch.rand(2, 4, 3, 70, 64, generator=torch.Generator().manual_seed(1))
    expected = theirs(images[0], images[1], normalize=True).flatten().double()
    found = load_lpips(str(folder), "frontier.lpips")(images[0], images[1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found.min() > 0.01


def test_equal_images_are_at_no_distance_and_small_grey_ones_will_do(folder):
    distance = load_lpips(str(folder), "frontier.lpips")
    grey = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    assert distance(grey, grey).tolist() == [0, 0, 0]
    near, far = distance(grey, (grey + 0.01).clamp(0, 1)), distance(grey, 1 - grey)
    assert (near < far).all()


def test_weights_that_are_not_at_hand_are_asked_for(folder, monkeypatch):
    with pytest.raises(UsageError, match=r"frontier.lpips=/no/such: holds no alexnet\*.pth"):
        load_lpips("/no/such", "frontier.lpips")
    monkeypatch.setattr("fedleak.evaluation.lpips._of_torchmetrics", lambda: None)
    with pytest.raises(UsageError, match=r"holds no LPIPS's alex.pth"):
        load_lpips(str(folder), "frontier.lpips")
    torch.save({"other": torch.zeros(1)}, folder / "alex.pth")
    with pytest.raises(UsageError, match="is damaged or another's"):
        load_lpips(str(folder), "frontier.lpips")
