import pytest
import torch

from fedleak.models import LeNet


@pytest.mark.parametrize(("shape", "features"), [((1, 28, 28), 588), ((3, 32, 32), 768), ((3, 17, 40), 12 * 5 * 10)])
@pytest.mark.parametrize("classes", [2, 100])
def test_any_image_shape_and_class_count(shape, features, classes):
    model = LeNet(shape, classes)
    assert model.fc.in_features == features
    assert model(torch.rand(3, *shape)).shape == (3, classes)


def test_the_published_network():
    model = LeNet((3, 32, 32), 100)
    convolutions = [m for m in model.body if isinstance(m, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride) for c in convolutions] == [
        (3, 12, (5, 5), (2, 2)),
        (12, 12, (5, 5), (2, 2)),
        (12, 12, (5, 5), (1, 1)),
    ]
    assert sum(isinstance(m, torch.nn.Sigmoid) for m in model.body) == 3
    assert model.fc.in_features == 768
