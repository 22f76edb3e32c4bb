import pytest
import torch

from fedleak.errors import UsageError
from fedleak.models import Normalize, RepeatChannels


def test_normalize_subtracts_and_divides_by_channel():
    layer = Normalize([0.5, 0.25], [0.5, 2.0])
    images = torch.stack([torch.full((2, 2), 1.0), torch.full((2, 2), 0.75)])[None]
    assert torch.equal(layer(images)[0, 0], torch.full((2, 2), 1.0))
    assert torch.equal(layer(images)[0, 1], torch.full((2, 2), 0.25))


def test_normalize_adds_nothing_to_what_is_shared():
    layer = Normalize([0.5], [0.5])
    assert not list(layer.parameters())
    assert not layer.state_dict()
    assert layer.to(torch.float64).mean.dtype == torch.float64  # yet it moves with the model


@pytest.mark.parametrize(
    ("mean", "std"), [([0.5], [0.0]), ([0.5], [-1]), ([0.5], [0.5, 0.5]), ([], []), ([float("nan")], [1])]
)
def test_impossible_statistics_are_refused(mean, std):
    with pytest.raises(UsageError, match=r"model\.normalize"):
        Normalize(mean, std)


def test_repeat_channels_repeats_the_channel():
    images = torch.rand(2, 1, 4, 4)
    repeated = RepeatChannels(3)(images)
    assert repeated.shape == (2, 3, 4, 4)
    assert all(torch.equal(repeated[:, c], images[:, 0]) for c in range(3))
