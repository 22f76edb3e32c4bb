"""Normalisation in front of a model that keeps its names."""

import copy

import pytest
import torch
from torch.func import functional_call

from fedleak.attacks.chain.reader import read_layers
from fedleak.errors import UsageError
from fedleak.models import LeNet
from fedleak.models.normalized import normalized


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.25), ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])])
def test_images_are_normalised_and_names_stay(mean, std):
    model = LeNet((3, 16, 16), 10)
    made = normalized(model, mean, std)
    images = torch.rand(2, 3, 16, 16)
    shift, scale = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    expected = model((images - shift) / scale)
    assert list(made.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(made(images), expected)
    torch.testing.assert_close(copy.deepcopy(made)(images), expected)
    torch.testing.assert_close(functional_call(made, dict(model.named_parameters()), (images,)), expected)
    if isinstance(mean, float):
        assert read_layers(made, (3, 16, 16)) is not None, "the fast way must stay open"


def test_numbers_that_cannot_be_used():
    with pytest.raises(UsageError, match="above 0"):
        normalized(LeNet((3, 16, 16), 10), 0.5, 0.0)
