"""Shared by all tests: small runs of the real thing."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line does, before torch starts its threads

import pytest
import torch

from fedleak.capture import Observation
from fedleak.cli import main
from fedleak.local_update import local_update
from fedleak.models import LeNet
from fedleak.training import SGD, LocalTraining

SMALL = ["attack=idlg", "federation.clients=2", "federation.rounds=2", "federation.batch_size=1", "attack.restarts=2"]
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def refuse_skip(report: Report) -> Report:
    """In CI (FEDLEAK_NO_SKIP=1) a test that skips has failed, unless what it lacks is data that no package brings."""
    if os.environ.get("FEDLEAK_NO_SKIP") == "1" and report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if "../shared" not in reason:
            report.outcome, report.longrepr = "failed", f"{reason} (nothing may skip: FEDLEAK_NO_SKIP=1)"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return refuse_skip((yield))


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
