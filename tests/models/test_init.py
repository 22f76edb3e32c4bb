import pytest
import torch

from fedleak.errors import UsageError
from fedleak.models import LeNet, initialise


def test_uniform_fills_every_parameter_from_the_published_interval():
    model = LeNet()
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 9)
    initialise(model, "uniform")
    values = torch.cat([p.flatten() for p in model.parameters()])
    assert values.abs().max() <= 0.5
    assert values.min() < -0.49
    assert values.max() > 0.49
    # Variance 1/12 within five standard errors (a uniform's fourth central moment is 1/80).
    assert abs(values.var() - 1 / 12) < 5 * ((1 / 80 - 1 / 144) / len(values)) ** 0.5
    assert all(p.min() < p.max() for p in model.parameters())


def test_default_leaves_the_constructor_s_values():
    model = LeNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    initialise(model, "default")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_unknown_is_refused():
    with pytest.raises(UsageError, match=r"^model\.init=xavier .*uniform, default"):
        initialise(LeNet(), "xavier")
