"""Model, data and private training, as an app that never heard of fedleak has them."""

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
    generator = torch.Generator().manual_seed(300 + partition_id)
    patterns = torch.rand(10, 1, 14, 14, generator=torch.Generator().manual_seed(2))
    labels = torch.randint(0, 10, (32,), generator=generator)
    images = (patterns[labels] + 0.1 * torch.randn(32, 1, 14, 14, generator=generator)).clamp(0, 1)
    return DataLoader(TensorDataset(images, labels), batch_size=32)


def train(net, train_loader, privacy_engine, optimizer, device, epochs=1):
    """One private epoch or several."""
    criterion = torch.nn.CrossEntropyLoss()
    net.to(device).train()
    for _ in range(epochs):
        for images, labels in train_loader:
            if not len(labels):
                continue
            optimizer.zero_grad()
            criterion(net(images.to(device)), labels.to(device)).backward()
            optimizer.step()
    return privacy_engine.get_epsilon(delta=1e-5)
