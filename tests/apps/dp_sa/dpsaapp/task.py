"""Model, data and training, as an app that never heard of fedleak has them."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A small convolutional network for grey images of 14 × 14."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.fc1 = nn.Linear(6 * 5 * 5, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def load_data(partition_id):
    """A partition of made-up images with a pattern a class."""
    generator = torch.Generator().manual_seed(400 + partition_id)
    patterns = torch.rand(10, 1, 14, 14, generator=torch.Generator().manual_seed(3))
    labels = torch.randint(0, 10, (32,), generator=generator)
    images = (patterns[labels] + 0.1 * torch.randn(32, 1, 14, 14, generator=generator)).clamp(0, 1)
    return DataLoader(TensorDataset(images, labels), batch_size=32)


def train(net, trainloader, epochs, lr, device):
    """Train the model on the training set."""
    net.to(device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
    return loss.item()


def get_weights(net):
    """The model as a list of arrays."""
    return [value.cpu().numpy() for value in net.state_dict().values()]


def set_weights(net, parameters):
    """A list of arrays into the model."""
    state = {name: torch.tensor(value) for name, value in zip(net.state_dict(), parameters, strict=True)}
    net.load_state_dict(state, strict=True)
