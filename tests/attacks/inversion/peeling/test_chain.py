import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedleak.attacks.base import Knowledge
from fedleak.attacks.chain import Linear
from fedleak.attacks.inversion.peeling import closed_form
from fedleak.attacks.inversion.peeling.chain import Chain
from fedleak.models.lenet import LeNet


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5]).view(1, 2, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3]).view(1, 2, 1, 1))
        self.conv = nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1), bias=False)
        self.fc = nn.Linear(3 * 5 * 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = (images - self.mean) / self.std
        x = F.leaky_relu(self.conv(x), 0.2)
        return self.fc(x.view(x.size(0), -1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(16, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc((images + self.conv(images)).flatten(1))


def mlp(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), *layers, nn.Linear(8, 3))


MODELS = {
    "lenet": (LeNet((3, 9, 12), 5), (3, 9, 12), 5),
    "normalised, strided, dilated": (Normalised(), (2, 9, 7), 4),
    "tanh": (mlp(nn.Tanh()), (1, 4, 4), 3),
    "elu": (mlp(nn.ELU(0.7)), (1, 4, 4), 3),
    "softplus": (mlp(nn.Softplus(2.0)), (1, 4, 4), 3),
    "relu": (mlp(nn.ReLU()), (1, 4, 4), 3),
    "dropout, eval": (mlp(nn.Dropout()).eval(), (1, 4, 4), 3),
    "linear": (mlp(), (1, 4, 4), 3),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_autograd(name):
    model, shape, classes = MODELS[name]
    model = model.double()
    chain = Chain.read(model, shape)
    assert chain is not None
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, *shape, dtype=torch.float64, generator=generator)
    labels = torch.randint(classes, (2, 3), generator=generator)
    stacked = {
        name: torch.stack([p.detach(), p.detach() + 0.1 * torch.randn(p.shape, generator=generator)])
        for name, p in model.named_parameters()
    }
    found = chain.gradients(images, labels, stacked)
    assert set(found) == set(stacked)
    for problem in range(2):
        own = {name: value[problem].clone().requires_grad_() for name, value in stacked.items()}
        logits = torch.func.functional_call(model, own, (images[problem],))
        wanted = torch.autograd.grad(F.cross_entropy(logits, labels[problem]), list(own.values()))
        torch.testing.assert_close(
            chain.forward(images, stacked)[-1][problem, ..., 0], logits.detach(), rtol=1e-9, atol=1e-12
        )
        for key, value in zip(own, wanted, strict=True):
            torch.testing.assert_close(found[key][problem], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["tanh", "elu", "softplus", "lenet", "normalised, strided, dilated"])
def test_the_inverse_undoes_and_the_slope_is_the_derivative(name):
    model, shape, _ = MODELS[name]
    chain = Chain.read(model, shape)
    for layer in chain.layers:
        if isinstance(layer, Linear):
            continue
        inputs = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(1, 2, 4).requires_grad_()
        outputs = layer.value(inputs)
        torch.testing.assert_close(layer.inverse(outputs), inputs)
        (slope,) = torch.autograd.grad(outputs.sum(), inputs)
        outputs = outputs.detach()
        torch.testing.assert_close(layer.slope(outputs), slope)
        assert float(outputs.min()) >= layer.low
        assert float(outputs.max()) <= layer.high


def tied() -> nn.Module:
    layer = nn.Linear(16, 16)
    return nn.Sequential(nn.Flatten(), layer, nn.Sigmoid(), layer)


@pytest.mark.parametrize(
    "model",
    [
        Residual(),
        tied(),
        nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2)),
        nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 2)),
        nn.Sequential(nn.Conv2d(1, 2, 3, padding="same"), nn.Flatten(), nn.Linear(32, 2)),
        mlp(nn.Dropout()).train(),
        nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.Sigmoid()),
        nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(16, 2)),
    ],
    ids=["residual", "tied", "pool", "batchnorm", "same", "dropout", "activation last", "linear on an image"],
)
def test_what_is_no_chain_is_not_read_as_one(model):
    assert Chain.read(model, (1, 4, 4)) is None


def test_tracing_leaves_batchnorm_statistics_alone():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert closed_form([], [], Knowledge(model, (1, 4, 4), 2)) == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
