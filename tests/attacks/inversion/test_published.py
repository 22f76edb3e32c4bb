"""Published attacks as presets on small networks, and the statistics that BatchNorm's buffers tell."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedleak.attacks import Knowledge, LabelGuess
from fedleak.attacks.base import Run
from fedleak.attacks.batch_norm import batch_statistics, running_statistics, sizes_of, statistics_gap
from fedleak.attacks.inversion.gradinversion import GradInversion, registered
from fedleak.capture import Observation
from fedleak.errors import UsageError
from fedleak.local_update import local_update
from fedleak.models import ConvNet
from fedleak.setup import compose
from fedleak.training import LocalTraining

SHAPE = (1, 9, 9)


def observed(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, train: bool) -> Observation:
    start = {n: p.detach() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    training = LocalTraining(batch_size=len(images), local_steps=1, training_mode=train)
    found = local_update(model, start, buffers, images, labels, training)
    return Observation(1, 0, start, found.update, training, start_buffers=buffers, buffers=found.buffers)


def convnet(dtype: torch.dtype = torch.float32) -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(SHAPE, 5, width=4).to(dtype)


def test_the_statistics_of_a_batch_come_out_of_the_returned_buffers_exactly():
    model = convnet(torch.float64)
    images, labels = torch.rand(3, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 2])
    observation = observed(model, images, labels, train=True)
    sizes = sizes_of(model, (3, *SHAPE))
    found = batch_statistics(model, observation.start_buffers, observation.buffers, sizes)
    first = model.body[0](images)  # what the first BatchNorm saw
    mean, var = found["body.1"]
    assert torch.allclose(mean, first.mean((0, 2, 3)), atol=1e-12)
    assert torch.allclose(var, first.var((0, 2, 3), correction=0), atol=1e-12)
    assert len(found) == 8
    own = {n: p.detach() for n, p in model.named_parameters()}
    model.train()
    assert statistics_gap(model, own, dict(observation.start_buffers), images, found) < 1e-5
    assert statistics_gap(model, own, dict(observation.start_buffers), 1 - images, found) > 1e-3


def test_where_buffers_tell_nothing_the_running_ones_stand_in():
    model = convnet()
    images, labels = torch.rand(3, *SHAPE), torch.tensor([0, 1, 2])
    observation = observed(model, images, labels, train=False)
    sizes = sizes_of(model, (3, *SHAPE))
    assert batch_statistics(model, observation.start_buffers, observation.buffers, sizes) is None
    assert batch_statistics(model, observation.start_buffers, {}, sizes) is None
    assert set(running_statistics(model, observation.start_buffers)) == set(sizes)
    assert running_statistics(model, {}) == {}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a cumulative average
    moved = observed(model, images, labels, train=True)
    assert batch_statistics(model, moved.start_buffers, moved.buffers, sizes) is None


@pytest.mark.parametrize("train", [True, False])
def test_gradinversion_lowers_its_objective_and_reports_every_update(train):
    model = convnet()
    images, labels = torch.rand(2, *SHAPE), torch.tensor([1, 3])
    observation = observed(model, images, labels, train=train)
    inversion = GradInversion(seeds=2, max_evaluations=40, trace_every=10)
    seen = []
    run = Run(on_result=lambda index, result: seen.append(index))
    broken = Observation(2, 0, observation.parameters, {}, observation.training, error="empty")
    guess = LabelGuess(labels[None], torch.ones(1))
    knowledge = Knowledge(model, SHAPE, 5)
    found, failed = inversion.invert([observation, broken], [guess, None], knowledge, run)
    assert (seen, failed.stop_reason) == ([0, 1], "empty")
    assert found.restarts == 2
    assert found.evaluations == 2 * 40
    assert found.details["method"] == "gradinversion"
    short = GradInversion(seeds=2, max_evaluations=4)
    (early,) = short.invert([observation], [guess], knowledge, Run())
    assert found.objective < 0.9 * early.objective


def test_the_registered_mean_undoes_shifts():
    image = torch.zeros(1, 1, 12, 12)
    image[0, 0, 3:6, 4:8] = 1
    moved = [image, image, image.roll((1, 2), (-2, -1)), image]
    assert torch.allclose(registered(moved), image, atol=1e-5)


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match=r"^inversion\.seeds=0"):
        GradInversion(seeds=0)


@pytest.mark.parametrize("preset", ["inverting_gradients", "gradinversion"])
def test_presets_run_on_a_small_network(preset):
    attack = compose([f"attack={preset}", "attack.max_evaluations=6", "attack.restarts=1"]).attack.build()
    model = convnet()
    images, labels = torch.rand(1, *SHAPE), torch.tensor([1])
    observation = observed(model, images, labels, train=False)
    (found,) = attack([observation], Knowledge(model, SHAPE, 5))
    assert found.labels.tolist() == [1]
    assert found.evaluations == 6
    assert ((found.images >= 0) & (found.images <= 1)).all()
