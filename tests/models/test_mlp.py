import pytest
import torch

from fedleak.errors import UsageError
from fedleak.models import MLP
from fedleak.models.parts import ACTIVATIONS


def test_without_hidden_layers_it_is_the_784_10_network():
    model = MLP((1, 28, 28), 10)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "fc.weight": (10, 784),
        "fc.bias": (10,),
    }
    images = torch.rand(5, 1, 28, 28)
    assert torch.allclose(model(images), images.flatten(1) @ model.fc.weight.T + model.fc.bias, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hidden_layers_have_an_activation_each(activation):
    model = MLP((3, 4, 4), 7, hidden=(6, 5), activation=activation)
    assert [tuple(p.shape) for p in model.parameters() if p.dim() == 2] == [(6, 48), (5, 6), (7, 5)]
    assert sum(isinstance(m, ACTIVATIONS[activation]) for m in model.body) == 2
    assert model(torch.rand(2, 3, 4, 4)).shape == (2, 7)


def test_impossible_settings_are_refused():
    with pytest.raises(UsageError, match=r"^model\.activation=step .*sigmoid"):
        MLP(activation="step")
    for hidden in [(0,), (8, -1), ("8",), "88", (2.5,), (True,), 8, None]:
        with pytest.raises(UsageError, match=r"^model\.hidden="):
            MLP(hidden=hidden)
