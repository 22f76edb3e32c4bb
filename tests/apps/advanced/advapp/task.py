"""Model, data and training, as an app that never heard of fedleak has them."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A small convolutional network for grey images of 28 × 28."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5)
        self.conv2 = nn.Conv2d(16, 32, 5)
        self.fc1 = nn.Linear(32 * 4 * 4, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(x)


def load_data(partition_id, batch_size):
    """A partition of made-up images with a pattern a class, normalised to [-1, 1]."""
    generator = torch.Generator().manual_seed(200 + partition_id)
    patterns = torch.rand(10, 1, 7, 7, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, 10, (batch_size,), generator=generator)
    images = F.interpolate(patterns[labels], size=28, mode="bilinear")
    images = (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    return DataLoader(TensorDataset((images - 0.5) / 0.5, labels), batch_size=batch_size, shuffle=True)


def train(net, trainloader, epochs, lr, device):
    """Train the model on the training set."""
    net.to(device).train()
    criterion = torch.nn.CrossEntropyLoss().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    running_loss = 0.0
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            loss = criterion(net(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    return running_loss / len(trainloader)
