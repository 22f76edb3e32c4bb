"""Every attack and label method runs small on a device that is not the CPU, where a tensor that strays is an error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fedleak.attacks.base import Knowledge
from fedleak.capture import Observation
from fedleak.cli import main
from fedleak.local_update import local_update
from fedleak.models import LeNet, build_model
from fedleak.setup import compose
from fedleak.threat import ThreatModel
from fedleak.training import SGD, LocalTraining

CONF = Path(__file__).parents[2] / "conf" / "attack"
SHAPE, CLASSES = (1, 8, 8), 4
SMALL = ["attack.restarts=2", "attack.max_evaluations=4"]
PRESETS = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "none")
LABELS = sorted(path.stem for path in (CONF / "labels").glob("*.yaml"))
INVERSIONS = sorted(path.stem for path in (CONF / "inversion").glob("*.yaml"))


def lenet() -> nn.Module:
    torch.manual_seed(0)
    return LeNet(SHAPE, CLASSES)


def observations(model, *, samples=2, count=2, fixed=False, shape=SHAPE, **training) -> list[Observation]:
    """Updates of `count` clients, or of as many rounds of one client."""
    known = LocalTraining(**{"batch_size": samples, "local_steps": 1, "optimizer": SGD(0.1), **training})
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    buffers = {n: v.clone() for n, v in model.named_buffers() if v.is_floating_point()}
    made = []
    for i in range(count):
        random = torch.Generator().manual_seed(0 if fixed else i)
        images = torch.rand(samples * known.local_steps, *shape, generator=random)
        labels = torch.randint(CLASSES, (len(images),), generator=random)
        result = local_update(model, parameters, buffers, images, labels, known)
        where = (i + 1, 0) if fixed else (1, i)
        granted = {"labels": labels.sort().values, "buffers": result.buffers}
        made.append(Observation(*where, parameters, result.update, known, buffers, **granted))
        if fixed:
            parameters = {name: value - 0.1 * result.update[name] for name, value in parameters.items()}
    return made


def knowledge(model, shape=SHAPE, **grants) -> Knowledge:
    everything = {"labels": True, "buffers": True, "auxiliary_data": True, **grants}
    random = torch.Generator().manual_seed(9)
    auxiliary = torch.rand(40, *shape, generator=random), torch.arange(40) % CLASSES
    return Knowledge(model, shape, CLASSES, ThreatModel(**everything), auxiliary)


def moved(observation: Observation, device: torch.device) -> Observation:
    """As of a user whose own loop kept it there."""
    tensors = ("parameters", "update", "start_buffers", "buffers")
    there = {name: {k: v.to(device) for k, v in getattr(observation, name).items()} for name in tensors}
    return replace(observation, **there, labels=observation.labels.to(device))


def attacked(device, overrides, model, there=False, **federation):
    attack = compose(["threat=informed", *SMALL, *overrides]).attack.build()
    samples = 1 if attack.labels.most_samples == 1 else 2
    seen = observations(model, **{"samples": samples, **federation})
    known = knowledge(model, federation.get("shape", SHAPE), per_sample_gradients=federation.get("per_sample", False))
    if there:
        seen = [moved(o, device) for o in seen]
        known = replace(known, model=model.to(device), auxiliary=tuple(part.to(device) for part in known.auxiliary))
    results = attack(seen, known, device=device, seed=1)
    assert next(model.parameters()).device.type == (device.type if there else "cpu")
    assert len(results) == len(seen)
    for result in results:
        assert result.images.device.type == result.labels.device.type == "cpu"
        assert result.images.numpy() is not None


@pytest.mark.parametrize("name", PRESETS)
def test_attack(name, pretend):
    federation = {
        "fedavg": {"payload": "weights", "local_steps": 2},
        "surrogate": {"payload": "weights", "local_steps": 2},
        "joint": {"fixed": True},
        "idlg_per_sample": {"per_sample": True},
        "learned": {"samples": 1},
    }.get(name, {})
    labels = [] if name in ("dlg", "idlg_per_sample", "labels_only", "version1") else ["attack/labels=known"]
    few = [f"attack.inversion.{setting}" for setting in ("examples=40", "projections=8", "steps=2", "rounds=1")]
    chosen = [f"attack={name}", *labels, *(few if name == "learned" else [])]
    attacked(pretend, chosen, lenet(), there=name == "labels_only", **federation)


@pytest.mark.parametrize("name", LABELS)
def test_labels(name, pretend):
    federation = {"per_sample": True} if name == "per_sample" else {}
    attacked(pretend, ["attack=labels_only", f"attack/labels={name}"], lenet(), there=True, **federation)


def inversions():
    """Those that no preset runs; a longer test has them all on networks of other kinds."""
    presets = {"fedavg": "unrolled", "labels_only": "none", "dlg": "gradient_matching"}
    return [name for name in INVERSIONS if name not in {presets.get(preset, preset) for preset in PRESETS}]


@pytest.mark.parametrize("name", inversions())
def test_inversion(name, pretend):
    few = ["starts=1", "stages=3", "evaluations=2"] if name == "features" else []
    chosen = ["attack/labels=known", f"attack/inversion={name}", *(f"attack.inversion.{setting}" for setting in few)]
    attacked(pretend, ["attack=fedleak", *chosen], lenet())


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("gradinversion", "cnn"),
        ("fedavg", "cnn"),
        *(slow(name, model) for name in ("gradinversion", "fedavg", "map") for model in ("mlp", "resnet20", "vit")),
        *(slow("fedleak", model) for model in ("mlp", "resnet20", "vit")),
    ],
)
def test_models(name, model, pretend):
    federation = {"fedavg": {"payload": "weights", "local_steps": 2}}.get(name, {})
    shape = (1, 20, 20) if model == "cnn" else SHAPE
    built = build_model(compose([f"model={model}"]).model, shape, CLASSES, 0)
    few = ["attack.inversion.seconds=1"] if name in ("map", "fedleak") else []
    attacked(pretend, [f"attack={name}", "attack/labels=known", *few], built, shape=shape, **federation)


DEFENSES = sorted(path.stem for path in (CONF.parent / "defense").glob("*.yaml"))


def run(folder, *overrides):
    few = ["federation.clients=2", "federation.rounds=1", "federation.batch_size=2", "data.image_size=8"]
    assert main(["run", *few, "attack.clients=1", *SMALL, *overrides, f"output_dir={folder}"]) == 0


@pytest.fixture
def everywhere(pretend, monkeypatch):
    """Whatever asks which device there is gets the pretend one."""
    monkeypatch.setattr("fedleak.devices.resolve_device", lambda name: pretend)


def test_a_run(everywhere, tmp_path):
    """Clients train on the device, and the limit and the judgement are computed there."""
    run(tmp_path / "run", "attack=inverting_gradients", "attack/labels=fedleak", "defense=gaussian")


@pytest.mark.slow
@pytest.mark.parametrize("defense", DEFENSES)
def test_defense(defense, everywhere, tmp_path):
    attack = ["attack=labels_only"] if defense == "soteria" else ["attack.adaptive=true", "threat.defense=true"]
    run(tmp_path / "run", f"defense={defense}", *attack)


def test_a_stray_tensor_is_an_error(pretend, forgiven):
    """The device does what CUDA does, or these tests could not fail."""
    there = torch.ones(3, 2, device=pretend)
    for stray in (lambda: there + torch.ones(2), lambda: torch.ones(2)[there[:, 0].long()], lambda: there.numpy()):
        with pytest.raises((RuntimeError, TypeError)):
            stray()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device=pretend, generator=torch.Generator())
    assert (there * torch.tensor(2.0))[torch.tensor([0, 2])].cpu().sum() == 8
