"""Shared by all tests: small runs of the real thing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line does, before torch starts its threads

import pytest
import torch

from fedleak.capture import Observation
from fedleak.cli import main
from fedleak.local_update import local_update
from fedleak.models import LeNet
from fedleak.training import SGD, LocalTraining

SMALL = ["attack=idlg", "federation.clients=2", "federation.rounds=2", "federation.batch_size=1", "attack.restarts=2"]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of `fedleak run` on digits: 2 clients, 2 rounds, batch size 1, iDLG. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert main(["run", *SMALL, f"output_dir={folder}"]) == 0
    return folder


@pytest.fixture
def observe() -> Callable[..., tuple[Observation, torch.Tensor, torch.Tensor]]:
    """Make (observation, private images, private labels) of a fresh LeNet without a federation."""

    def make(batch_size: int = 1, *, payload="gradient", lr: float = 0.1, local_steps: int = 1, seed: int = 0, **known):
        torch.manual_seed(seed)
        model = LeNet((1, 28, 28), 10)
        for p in model.parameters():
            torch.nn.init.uniform_(p, -0.5, 0.5)
        images = torch.rand(batch_size * local_steps, 1, 28, 28)
        labels = torch.randint(0, 10, (batch_size * local_steps,))
        parameters = {n: p.detach() for n, p in model.named_parameters()}
        training = LocalTraining(payload, batch_size, local_steps, optimizer=SGD(lr))
        result = local_update(model, parameters, {}, images, labels, training)
        return Observation(1, 0, parameters, result.update, training, **known), images, labels

    return make
